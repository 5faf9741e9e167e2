"""Names of a model's arrays: what identifies one is its path in the tree, not a text with dots."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax


def distinct_names(paths: list[tuple], shown: list[bool], kind: str) -> list[str]:
    """A name for each path in a tree, no two the same.

    The shortest is as the user knows a parameter. Where two would be the same, both get a longer one: with what the
    container adds, then as JAX writes the path, then with its number. Arrays that are not `shown`, for they are never
    trained, leave the short names to others.

    >>> key, index = jax.tree_util.DictKey, jax.tree_util.SequenceKey
    >>> distinct_names([(key("enc"), key("w")), (key("enc.w"),), (key("a"), index(0))], [True] * 3, "function")
    ["['enc']['w']", "['enc.w']", 'a.0']
    """
    forms = []
    for number, path in enumerate(paths):
        name, exact = dotted(path), jax.tree_util.keystr(path) or "parameters"
        forms.append((without_container(name, kind), name, exact, f"{exact} #{number}"))
    level = [0 if own else 2 for own in shown]
    while True:
        names = [form[at] for form, at in zip(forms, level, strict=True)]
        count = Counter(names)
        longer = [n for n, name in enumerate(names) if count[name] > 1 and level[n] < 3]
        if not longer:
            return names
        for n in longer:
            level[n] += 1


def dotted(path: tuple) -> str:
    """The keys of a path joined by dots.

    >>> dotted((jax.tree_util.DictKey("head"), jax.tree_util.GetAttrKey("bias"), jax.tree_util.SequenceKey(1)))
    'head.bias.1'
    """
    return ".".join(_text(key) for key in path) or "parameters"


def _text(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def without_container(name: str, kind: str) -> str:
    """Without what only the container adds: NNX's two states and `.value`, Linen's pair and `params`.

    >>> without_container("0.layer.kernel.value", "nnx"), without_container("0.params.Dense_0.bias", "linen")
    ('layer.kernel', 'Dense_0.bias')
    """
    name = name.removesuffix(".value")
    if kind in ("nnx", "linen"):
        name = name.partition(".")[2] or name
    first, _, rest = name.partition(".")
    return rest if rest and first == "params" else name
