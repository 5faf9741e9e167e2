"""Keras models on KERAS_BACKEND's framework, and squared norms of their single samples, against a dense Jacobian: 2e-5
relative in float32, 1e-9 in float64; half of that for the norms.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import lnp
import lnp_keras
from integrations.keras_reference import BACKEND, factors, jacobian, numpy, of_jacobian
from lnp.results.decomposition import decompose

TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside Keras


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy(), keras.config.floatx()
    yield
    keras.config.set_dtype_policy(before[0])
    keras.config.set_floatx(before[1])


@pytest.fixture
def float64():
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")  # operations round to it whatever the policy


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def tokens(*shape, high=7):
    return np.random.default_rng(0).integers(1, high, shape)


def stack(*made):
    return lambda: keras.Sequential([make() for make in made])


class Tied(keras.Model):
    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(7, 4)

    def call(self, ids):
        return ops.tanh(self.table(ids)) @ ops.transpose(ops.convert_to_tensor(self.table.embeddings))


class Attention(keras.Model):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.norm, self.core = layers.LayerNormalization(), layers.MultiHeadAttention(2, 3)

    def call(self, x, training=None):
        y = self.norm(x)
        return x + self.core(y, y, use_causal_mask=self.causal, training=training)


class Twice(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer, self.head = layers.Dense(4, "tanh"), layers.Dense(3)

    def call(self, x):
        return self.head(self.layer(self.layer(x)))


class Experts(keras.Model):
    """Each sample goes through one expert, whose weights are gathered."""

    def build(self, shape):
        self.experts = self.add_weight(shape=(2, 4, 3), name="experts")
        self.gate = self.add_weight(shape=(4, 2), name="gate")

    def call(self, x):
        chosen = ops.cast(x[:, 0] > 0, "int32")
        weights = ops.take(ops.convert_to_tensor(self.experts), chosen, axis=0)
        return ops.einsum("ni,nio->no", x, weights) * ops.softmax(x @ self.gate)[:, :1]


def of(cls, *args):
    return lambda: cls(*args)


MODELS = {
    "dense": (stack(of(layers.Dense, 5, "tanh"), of(layers.Dense, 3)), normal(4, 6)),
    "conv1d, dilated": (stack(lambda: layers.Conv1D(3, 3, dilation_rate=2), layers.Flatten), normal(3, 8, 2)),
    "conv2d, grouped": (stack(lambda: layers.Conv2D(4, 2, groups=2), layers.Flatten), normal(3, 3, 3, 4)),
    "conv2d, depthwise": (stack(lambda: layers.DepthwiseConv2D(2), layers.Flatten), normal(3, 3, 3, 2)),
    "conv2d, separable": (
        stack(lambda: layers.SeparableConv2D(3, 2), layers.GlobalAveragePooling2D),
        normal(3, 3, 3, 2),
    ),
    "conv3d": (stack(lambda: layers.Conv3D(2, 2), layers.Flatten), normal(2, 3, 3, 2, 1)),
    "transposed conv": (stack(lambda: layers.Conv2DTranspose(2, 2, strides=2), layers.Flatten), normal(2, 2, 2, 3)),
    "max pooling": (stack(lambda: layers.Conv2D(3, 2), layers.MaxPooling2D, layers.Flatten), normal(3, 5, 5, 2)),
    "batch norm": (stack(of(layers.Dense, 3), layers.BatchNormalization), normal(5, 4)),
    "layer norm": (stack(of(layers.Dense, 3), layers.LayerNormalization), normal(4, 4)),
    "group norm": (stack(of(layers.Conv1D, 4, 2), of(layers.GroupNormalization, 2), layers.Flatten), normal(3, 4, 2)),
    "instance norm": (
        stack(of(layers.Conv1D, 3, 2), of(layers.GroupNormalization, -1), layers.Flatten),
        normal(3, 4, 2),
    ),
    "RMS norm": (stack(of(layers.Dense, 3), layers.RMSNormalization), normal(4, 4)),
    "LSTM": (stack(of(layers.LSTM, 3)), normal(3, 4, 2)),
    "GRU": (stack(lambda: layers.Bidirectional(layers.GRU(2))), normal(3, 4, 2)),
    "embedding": (stack(of(layers.Embedding, 7, 3), layers.Flatten), tokens(3, 4, high=3)),
    "tied head": (Tied, tokens(3, 2)),
    "attention": (of(Attention, False), normal(3, 4, 6)),
    "causal attention": (of(Attention, True), normal(3, 4, 6)),
    "spectral norm": (stack(lambda: layers.SpectralNormalization(layers.Dense(4)), of(layers.Dense, 3)), normal(4, 4)),
    "one layer twice": (Twice, normal(4, 4)),
    "mixture of experts, gathered": (Experts, normal(5, 4)),
}
WIDE = ("dense", "conv2d, depthwise", "batch norm", "LSTM", "causal attention", "tied head")
"""Compared in float64 too, where Keras has it: on PyTorch and JAX its operations round to float32."""


def frozen(model, x):
    """run() in inference mode; the statistics of a normalisation at the end are those of its input."""
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
    if not norms:
        return lambda: model(x)
    seen = numpy(model.layers[0](x))

    def run():
        norms[0].moving_mean.assign(seen.mean(0))
        norms[0].moving_variance.assign(seen.var(0))
        return model(x)

    return run


def variables(model):
    return {v.path: numpy(v.value).tobytes() for v in model.variables}


class Everything:
    """A computation that returns the decomposition, and squared norms of single samples."""

    def __call__(self, lin):
        v = lin.signs(3)
        return {
            "d": decompose(lin, estimator="exact"),
            **{"norms": lin.sample_square_norms(v), "v": v, "cheap": lin.cheap},
        }


EVERYTHING = Everything()


def check(name, dtype):
    build, x = MODELS[name]
    model = build()
    x = x.astype(dtype) if x.dtype.kind == "f" else x
    model(x)
    y = normal(*model(x).shape, seed=1).astype(dtype)
    before = variables(model)
    # in training mode Keras's spectral normalisation writes to the very weight that is trained
    forward = inference if name == "spectral norm" else None
    found = lnp_keras.evaluate(EVERYTHING, model, ((x, y),), lnp.Options(loss="mse", forward=forward))
    assert variables(model) == before
    outputs, rows = jacobian(frozen(model, x), model)
    agrees(found["d"], of_jacobian(outputs, rows, lambda f: np.mean((f.reshape(y.shape) - y) ** 2), y.size), dtype)
    assert found["d"].probes == y[0].size, found["d"].notes  # the samples were taken apart
    same(found, model, rows, dtype)
    if BACKEND == "tensorflow":
        assert not any("differ" in note for note in found["d"].notes)
        # without oneDNN, TensorFlow has a grouped convolution's gradient from XLA alone, and Keras compiles it by that
        by_xla = name == "conv2d, grouped" and any("PartitionedCall" in note for note in found["d"].notes)
        assert found["cheap"] or by_xla, found["d"].notes


def agrees(d, expected, dtype):
    assert {key: getattr(d, key) for key in expected} == pytest.approx(expected, rel=TOLERANCE[dtype])


def same(found, model, rows, dtype):
    """Squared norms from the rows of the Jacobian."""
    v = numpy(found["v"])
    pulled = np.einsum("nk,nkp->np", v, rows.reshape(*v.shape, -1))
    sizes = np.cumsum([int(np.prod(p.shape)) for p in model.trainable_variables])[:-1]
    expected = np.stack([np.sum(part**2, 1) for part in np.split(pulled, sizes, axis=1)], 1)
    names = {id(p): key for key, p in lnp_keras.model.named_variables(model).items()}
    norms = np.stack([numpy(found["norms"][names[id(p)]]) for p in model.trainable_variables], 1)
    floor = 1e-3 * expected.sum(1, keepdims=True)  # a parameter's own norm may be rounding noise beside the whole
    assert np.all(np.abs(norms - expected) <= TOLERANCE[dtype] / 2 * (expected + floor))


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    check(name, "float32")


@pytest.mark.parametrize("name", WIDE if BACKEND == "tensorflow" else WIDE[:0])
def test_model_in_float64(name, float64):
    check(name, "float64")


def test_attention_runs_no_samples_on_their_own():
    """Its projections to heads and back are equations of `einsum`."""
    inputs = keras.Input((6, 8))
    heads = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    rows = layers.EinsumDense("abc,cd->abd", output_shape=(6, 5), bias_axes="d")(heads)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(rows)))
    d = lnp.decompose(model, (normal(16, 6, 8).astype("float32"), normal(16, 3).astype("float32")))
    assert d.population is not None
    assert not any("on their own" in note for note in d.notes)


def test_batch_normalisation_used_twice_is_measured_coupled():
    norm, dense = layers.BatchNormalization(), layers.Dense(4)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(norm(dense(norm(inputs)))))
    d = lnp.decompose(model, (normal(6, 4).astype("float32"), normal(6, 2).astype("float32")), estimator="exact")
    assert d.probes == 12
    assert any("interact" in note for note in d.notes)


def test_settings_of_batch_normalisation_are_put_back():
    model = keras.Sequential([layers.Dense(3), layers.BatchNormalization(momentum=0.9)])
    batch = normal(6, 4).astype("float32"), normal(6, 3).astype("float32")
    model(batch[0])
    lnp.decompose(model, batch)
    assert model.layers[1].momentum == 0.9


def test_dropout_is_on_as_in_fit_and_off_on_request():
    model = keras.Sequential([layers.Dense(16, "relu"), layers.Dropout(0.5), layers.Dense(2)])
    x, y = normal(6, 4).astype("float32"), normal(6, 2).astype("float32")
    model(x)
    seeds = variables(model)
    on, again = (lnp.decompose(model, (x, y), estimator="exact") for _ in range(2))
    off = lnp.decompose(model, (x, y), forward=inference, estimator="exact")
    assert variables(model) == seeds
    assert on.loss == again.loss != off.loss
    expected = factors(lambda: model(x), model, lambda f: np.mean((f - y) ** 2), 12)
    assert {key: getattr(off, key) for key in expected} == pytest.approx(expected, rel=2e-5)
    assert off.probes == 2
    assert any("dropout" in note for note in on.notes)


def inference(model, x):
    return model(x, training=False)


def test_low_rank_adapter_with_a_frozen_base():
    model = keras.Sequential([layers.Dense(3)])
    x, y = normal(5, 4).astype("float32"), normal(5, 3, seed=1).astype("float32")
    model(x)
    model.layers[0].enable_lora(2)
    model.layers[0].lora_kernel_b.assign(normal(2, 3))
    d = lnp.decompose(model, (x, y), by_layer=lambda name: name, estimator="exact")
    expected = factors(lambda: model(x), model, lambda f: np.mean((f - y) ** 2), 15)
    assert {key: getattr(d, key) for key in expected} == pytest.approx(expected, rel=2e-5)
    assert {name.rpartition(".")[2] for name in d.layers} == {"bias", "lora_kernel_a", "lora_kernel_b"}


def test_several_inputs_and_outputs():
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    a, b = layers.Dense(2, name="a")(left), layers.Dense(3, name="b")(layers.Concatenate()([left, right]))
    model = keras.Model({"left": left, "right": right}, {"a": a, "b": b})
    x = {"left": normal(4, 3).astype("float32"), "right": normal(4, 2).astype("float32")}
    y = normal(4, 5, seed=1).astype("float32")
    joined = lambda out: ops.concatenate([out["a"], out["b"]], axis=1)
    d = lnp.decompose(
        model, (x, y), lambda out, y: ops.mean((joined(out) - y) ** 2), loss_terms=20, estimator="exact", by_layer=True
    )
    expected = factors(lambda: joined(model(x)), model, lambda f: np.mean((f - y) ** 2), 20)
    assert {key: getattr(d, key) for key in expected} == pytest.approx(expected, rel=2e-5)
    assert set(d.layers) == {"a", "b"}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """bfloat16 rounds to 3 digits: 3% beside the same network in float32."""
    make = lambda policy: keras.Sequential([layers.Dense(32, "tanh", dtype=policy), layers.Dense(3, dtype=policy)])
    x, y = normal(16, 8).astype("float32"), tokens(16, high=3)
    narrow, wide = make(policy), make("float32")
    for model in (narrow, wide):
        model(x)
    narrow.set_weights(wide.get_weights())
    d, expected = (lnp.decompose(model, (x, y), estimator="exact") for model in (narrow, wide))
    for key in ("loss", "rate", "chi_loss", "chi_net", "chi_pos"):
        assert getattr(d, key) == pytest.approx(getattr(expected, key), rel=0.03)
    assert d.probes == 3, d.notes
    assert d.loss != pytest.approx(expected.loss, rel=1e-6)  # it did run in a narrow type
