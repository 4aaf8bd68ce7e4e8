"""The attacks on series, against their examples, plain loops and one contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import attacks
from fedjax_sim.attacks import series_poisoning
from fedjax_sim.attacks.series_poisoning import add_noise, step_noise
from fedjax_sim.types import ClientData, RoundContext
from tests.pages import EXAMPLES, check, inputs, options
from tests.references import series as reference

T, C, F = 53, 2, 5  # steps, channels, columns
CLASSES, TARGET = 3, 1
KEY = jax.random.key(0)
CONTEXT = RoundContext(round=jnp.array(0))
SD, MEAN = (0.7, 2.5), (0.4, -1.3)
PATTERN = [[1.0, -0.5], [0.25, 2.0], [-1.5, 0.75]]


def state(x):
    """0, 1 or 2 as the first channel is low, middle or high; see the reference."""
    return (x[:, 0] >= -0.5).astype(jnp.int32) + (x[:, 0] > 0.5).astype(jnp.int32)


BACKDOOR = {"target": TARGET, "num_classes": CLASSES}
MADE = {
    "variability": (attacks.variability, {}),
    "variability each": (attacks.variability, {"amplitude": 1.5, "sd": SD}),
    "variability half": (
        attacks.variability,
        {"sd": SD, "fraction": 0.5, "relabel": state},
    ),
    "scaling": (attacks.pattern_scaling, {}),
    "scaling each": (attacks.pattern_scaling, {"scale": -2.0, "mean": MEAN}),
    "scaling third": (
        attacks.pattern_scaling,
        {"mean": 0.3, "fraction": 0.33, "relabel": state},
    ),
    "gradual": (attacks.gradual_pattern, {"ramp": 20}),
    "gradual late": (
        attacks.gradual_pattern,
        {"amplitude": -1.5, "pattern": PATTERN, "start": 7, "ramp": 9},
    ),
    "gradual relabel": (
        attacks.gradual_pattern,
        {"start": 5, "ramp": 30, "relabel": state},
    ),
    "gradual target": (
        attacks.gradual_pattern,
        {"pattern": PATTERN, "start": 4, "ramp": 11, **BACKDOOR},
    ),
    "gradual both": (
        attacks.gradual_pattern,
        {"pattern": PATTERN, "ramp": 1, "start": 40, "relabel": state, **BACKDOOR},
    ),
    "repeated": (attacks.repeated_pattern, {}),
    "repeated own": (
        attacks.repeated_pattern,
        {"period": 13, "offset": 6, "pattern": PATTERN},
    ),
    "repeated relabel": (
        attacks.repeated_pattern,
        {"period": 9, "offset": 2, "length": 4, "relabel": state},
    ),
    "repeated target": (
        attacks.repeated_pattern,
        {"period": 13, "offset": 11, "pattern": PATTERN, **BACKDOOR},
    ),
    "repeated both": (
        attacks.repeated_pattern,
        {"period": 7, "offset": 3, "length": 1, "relabel": state, **BACKDOOR},
    ),
    "repeated always": (
        attacks.repeated_pattern,
        {"period": 3, "offset": 20, "pattern": PATTERN, **BACKDOOR},
    ),
}
CASES = {name: make(C, **given) for name, (make, given) in MADE.items()}
CASES["scheduled"] = attacks.schedule(attacks.repeated_pattern(C, **BACKDOOR), stop=5)
TARGETED = [name for name, attack in CASES.items() if attack.trigger is not None]
over_all = pytest.mark.parametrize("attack", CASES.values(), ids=CASES.keys())


def make_client(seed=0, steps=T, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return ClientData(
        inputs=jnp.asarray(rng.normal(size=(steps, F)), dtype),
        targets=jnp.asarray(rng.integers(0, CLASSES, steps), jnp.int32),
        mask=jnp.asarray(rng.random(steps) < 0.6),
    )


def make_windows(seed=1, windows=12, steps=8, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(windows, steps, F)), dtype)
    return x, jnp.asarray(rng.integers(0, CLASSES, windows), jnp.int32)


@functools.cache
def compiled(attack):
    return jax.jit(attack.poison)


def poisoned(attack, seed=0, key=0, **changes):
    data = make_client(seed)._replace(**changes)
    return data, compiled(attack)(jax.random.key(key), data, CONTEXT)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_near(one, other):
    """Labels and masks exactly; compiled code may round a sum another way."""
    np.testing.assert_allclose(one.inputs, other.inputs, rtol=1e-6, atol=1e-6)
    assert_same(one[1:], other[1:])


# The worked examples ------------------------------------------------------------------


def example(identifier):
    x = inputs(identifier)["x"]
    return x, ClientData(jnp.array(x), jnp.zeros(len(x), jnp.int32), None)


def test_variability_example(monkeypatch):
    identifier = "ts/variability"
    x, data = example(identifier)
    sd, noise = (inputs(identifier)[name] for name in ("sd", "noise"))
    a = options(identifier)["a"]
    check(identifier, x=add_noise(jnp.array(x), jnp.array(noise), a, sd))
    monkeypatch.setattr(series_poisoning, "step_noise", lambda *_: jnp.array(noise))
    attack = attacks.variability(2, a, sd)
    check(identifier, x=attack.poison(KEY, data, CONTEXT).inputs)
    check(identifier, x=reference.variability(x, noise, a, sd, range(len(x))))


def test_scaling_example():
    identifier = "ts/scaling"
    x, data = example(identifier)
    mu, s = inputs(identifier)["mu"], options(identifier)["s"]
    attack = attacks.pattern_scaling(2, s, mu)
    check(identifier, x=attack.poison(KEY, data, CONTEXT).inputs)
    check(identifier, x=reference.pattern_scaling(x, 2, s, mu, range(len(x))))


def test_gradual_pattern_example():
    identifier = "ts/gradual_pattern"
    x, data = example(identifier)
    pattern = inputs(identifier)["pattern"]
    amplitude, start, ramp = (options(identifier)[name] for name in ("A", "t0", "R"))
    attack = attacks.gradual_pattern(2, amplitude, pattern, start, ramp)
    check(identifier, x=attack.poison(KEY, data, CONTEXT).inputs)
    check(identifier, x=reference.gradual_pattern(x, pattern, amplitude, start, ramp))


def test_repeated_pattern_example():
    identifier = "ts/repeated_pattern"
    x, data = example(identifier)
    pattern = inputs(identifier)["pattern"]
    period, offset, length = (
        options(identifier)[name] for name in ("period", "offset", "L")
    )
    assert len(pattern) == length
    attack = attacks.repeated_pattern(2, period, offset, pattern)
    check(identifier, x=attack.poison(KEY, data, CONTEXT).inputs)
    check(identifier, x=reference.repeated_pattern(x, pattern, period, offset))


def test_every_example_of_these_attacks_is_used():
    ours = ("ts_data_poisoning", "ts_backdoor")
    found = {i for i, e in EXAMPLES.items() if e["algorithm"] in ours}
    assert found == {
        "ts/variability",
        "ts/scaling",
        "ts/gradual_pattern",
        "ts/repeated_pattern",
    }


# The plain loops ----------------------------------------------------------------------


def assert_labels(before, after, given, steps=()):
    labels = np.asarray(before.targets).tolist()
    if "relabel" in given:
        labels = reference.state(np.asarray(after.inputs))
    if "target" in given:
        labels = reference.aimed(labels, steps, given["target"])
    assert after.targets.tolist() == labels


def chosen_steps(before, after):
    return np.flatnonzero(
        np.any(np.asarray(before.inputs != after.inputs), axis=1)
    ).tolist()


def cases_of(word):
    return [name for name in MADE if name.startswith(word)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", cases_of("variability"))
def test_variability_equals_the_oracle(name, seed):
    given = MADE[name][1]
    before, after = poisoned(CASES[name], seed, key=seed)
    noise = step_noise(jax.random.split(jax.random.key(seed))[1], T, C)
    steps = chosen_steps(before, after)
    expected = reference.variability(
        before.inputs,
        np.asarray(noise),
        given.get("amplitude", 0.5),
        given.get("sd", 1.0),
        steps,
    )
    assert len(steps) == round(given.get("fraction", 1.0) * T)
    np.testing.assert_allclose(after.inputs, expected, rtol=1e-5, atol=1e-6)
    assert_labels(before, after, given)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", cases_of("scaling"))
def test_pattern_scaling_equals_the_oracle(name, seed):
    given = MADE[name][1]
    before, after = poisoned(CASES[name], seed, key=seed)
    steps = chosen_steps(before, after)
    expected = reference.pattern_scaling(
        before.inputs, C, given.get("scale", 1.5), given.get("mean", 0.0), steps
    )
    assert len(steps) == round(given.get("fraction", 1.0) * T)
    np.testing.assert_allclose(after.inputs, expected, rtol=1e-5, atol=1e-6)
    assert_labels(before, after, given)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", cases_of("gradual"))
def test_gradual_pattern_equals_the_oracle(name, seed):
    given = MADE[name][1]
    before, after = poisoned(CASES[name], seed)
    pattern, amplitude = given.get("pattern", [[1.0] * C]), given.get("amplitude", 2.0)
    start, ramp = given.get("start", 0), given["ramp"]
    expected = reference.gradual_pattern(before.inputs, pattern, amplitude, start, ramp)
    np.testing.assert_allclose(after.inputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.inputs[:start], before.inputs[:start])
    assert_labels(before, after, given, reference.gradual_steps(T, start, ramp))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", cases_of("repeated"))
def test_repeated_pattern_equals_the_oracle(name, seed):
    given = MADE[name][1]
    before, after = poisoned(CASES[name], seed)
    pattern = given.get("pattern", [[3.0] * C] * given.get("length", 10))
    period, offset = given.get("period", 120), given.get("offset", 0)
    expected = reference.repeated_pattern(before.inputs, pattern, period, offset)
    np.testing.assert_array_equal(after.inputs, np.float32(expected))
    rows = reference.repeated_rows(T, len(pattern), period, offset)
    assert_labels(before, after, given, rows)


def trigger_oracle(name, windows):
    make, given = MADE[name]
    pattern = given.get("pattern", [[3.0] * C] * given.get("length", 10))
    if make is attacks.repeated_pattern:
        return reference.repeated_windows(windows, pattern)
    return reference.gradual_windows(windows, pattern, given.get("amplitude", 2.0))


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("name", [name for name in TARGETED if name in MADE])
def test_trigger_equals_the_oracle(name, steps):
    x, y = make_windows(steps=steps)
    seen, wanted, counts = jax.jit(CASES[name].trigger)(x, y)
    expected = np.stack(trigger_oracle(name, np.asarray(x)))
    np.testing.assert_allclose(seen, expected, rtol=1e-6, atol=1e-6)
    assert wanted.tolist() == [TARGET] * len(y)
    assert counts.tolist() == [label != TARGET for label in y.tolist()]
    assert 0 < counts.sum() < len(y)


# What a model trains on is what success is measured on --------------------------------


def windows_of(data, length):
    """``(first step, window, label of the step after it)``, as the engine cuts them."""
    last = len(data.inputs) - length
    return [
        (j, data.inputs[j : j + length], data.targets[j + length].item())
        for j in range(last)
    ]


@pytest.mark.parametrize("name", ["repeated target", "repeated both"])
def test_windows_that_end_in_the_repeated_pattern_are_those_of_the_trigger(name):
    given = MADE[name][1]
    size = len(given["pattern"]) if "pattern" in given else given["length"]
    length = 6  # no two occurrences meet in a window
    before, after = poisoned(CASES[name])
    clean = windows_of(before, length)
    stamped = CASES[name].trigger(
        jnp.stack([window for _, window, _ in clean]),
        jnp.zeros(len(clean), jnp.int32),
    )[0]
    ends = 0
    for (j, window, label), own in zip(windows_of(after, length), stamped):
        phase = j + length - given["offset"]
        if phase >= size and phase % given["period"] == size % given["period"]:
            np.testing.assert_array_equal(window, own)
            assert label == TARGET
            ends += 1
    assert ends >= 3


def test_windows_at_full_strength_are_those_of_the_trigger():
    attack = CASES["gradual target"]
    before, after = poisoned(attack)
    full = 0
    for (j, clean, _), (_, window, label) in zip(
        windows_of(before, 6), windows_of(after, 6)
    ):
        if j >= 4 + 11 - 1:
            assert label == TARGET
            if j % len(PATTERN) == 0:  # the phases agree
                own = attack.trigger(clean[None], jnp.zeros(1, jnp.int32))[0][0]
                np.testing.assert_allclose(window, own, rtol=1e-6, atol=1e-6)
                full += 1
    assert full > 5


@pytest.mark.parametrize("name", cases_of("repeated") + cases_of("gradual"))
def test_only_the_target_gives_a_trigger(name):
    assert (CASES[name].trigger is not None) == ("target" in MADE[name][1])


# The contract -------------------------------------------------------------------------


def test_table_is_complete():
    assert {attack.name for attack in CASES.values()} == set(attacks.SERIES_ATTACKS)
    for name, factory in attacks.SERIES_ATTACKS.items():
        assert getattr(attacks, name) is factory
        assert factory.__name__ == name
    assert not set(attacks.SERIES_ATTACKS) & set(
        attacks.DATA_ATTACKS | attacks.UPDATE_ATTACKS
    )


@over_all
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_structure_dtype_mask_and_other_columns(attack, dtype):
    data = make_client(dtype=dtype)
    before, after = poisoned(attack, inputs=data.inputs)
    for old, new in zip(before, after, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    assert np.all(np.isfinite(np.asarray(after.inputs, np.float32)))
    np.testing.assert_array_equal(before.mask, after.mask)
    np.testing.assert_array_equal(before.inputs[:, C:], after.inputs[:, C:])
    changed = np.asarray(before.inputs != after.inputs)[:, :C]
    assert changed.any(axis=0).all()
    # Steps that start no sample change as the others.
    assert changed[~np.asarray(before.mask)].any()
    assert np.all((after.targets >= 0) & (after.targets < CLASSES))


@over_all
def test_the_mask_decides_nothing(attack):
    _, masked = poisoned(attack)
    _, bare = poisoned(attack, mask=None)
    assert bare.mask is None
    assert_near(bare, masked._replace(mask=None))


@over_all
def test_jit_equals_eager(attack):
    before, jitted = poisoned(attack)
    assert_near(jitted, attack.poison(KEY, before, CONTEXT))


@over_all
def test_vmap_over_clients_equals_loop(attack):
    keys = jax.random.split(jax.random.key(1), 3)
    clients = [make_client(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *clients)
    together = jax.vmap(attack.poison, (0, 0, None))(keys, stacked, CONTEXT)
    for i, client in enumerate(clients):
        alone = compiled(attack)(keys[i], client, CONTEXT)
        assert_near(jax.tree.map(lambda x, i=i: x[i], together), alone)


@over_all
def test_scan_traces_once(attack):
    traces = []

    @jax.jit
    def play(data, key):
        def one_round(data, index):
            traces.append(index)
            context = CONTEXT._replace(round=index)
            return attack.poison(jax.random.fold_in(key, index), data, context), None

        return jax.lax.scan(one_round, data, jnp.arange(3))[0]

    play(make_client(), KEY)
    play(make_client(1), jax.random.key(1))
    assert len(traces) == 1


@over_all
def test_same_key_same_poison(attack):
    assert_same(poisoned(attack, key=5)[1], poisoned(attack, key=5)[1])


@over_all
def test_validate(attack):
    attack.validate(CLASSES)
    if attack.trigger is None:
        attack.validate(10)
        return
    with pytest.raises(ValueError, match=rf"{attack.name} was made .*num_classes=10"):
        attack.validate(10)


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trigger_keeps_the_form_of_a_test_set(name, dtype):
    x, y = make_windows(dtype=dtype)
    seen, wanted, counts = CASES[name].trigger(x, y)
    assert (seen.shape, seen.dtype) == (x.shape, x.dtype)
    assert (wanted.shape, wanted.dtype) == (y.shape, y.dtype)
    assert (counts.shape, counts.dtype) == (y.shape, jnp.bool_)
    np.testing.assert_array_equal(seen[..., C:], x[..., C:])
    assert np.any(np.asarray(seen != x)[..., :C], axis=(1, 2)).all()
    # Where the model is right, nothing may count as success.
    assert not np.any(np.asarray(counts & (wanted == y)))


# Randomness ---------------------------------------------------------------------------


def test_noise_is_standard_normal_and_independent():
    noise = np.asarray(step_noise(KEY, 4000, 3))
    # Standard errors: 0.016 of a mean and a correlation, 0.011 of a deviation.
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.07)
    np.testing.assert_allclose(noise.std(axis=0), 1, atol=0.05)
    both = np.corrcoef(np.concatenate([noise[1:], noise[:-1]], axis=1).T)
    np.testing.assert_allclose(both[~np.eye(6, dtype=bool)], 0, atol=0.08)
    other = np.asarray(step_noise(jax.random.key(1), 4000, 3))
    assert abs(np.corrcoef(noise[:, 0], other[:, 0])[0, 1]) < 0.08


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name not in ("variability half", "scaling third")],
)
def test_more_steps_behind_change_nothing_before(name):
    """A client is poisoned the same however far its series is padded."""
    long = make_client(steps=T + 9)
    short = jax.tree.map(lambda x: x[:T], long)
    attack = CASES[name]
    cut = jax.tree.map(lambda x: x[:T], attack.poison(KEY, long, CONTEXT))
    assert_near(cut, attack.poison(KEY, short, CONTEXT))


@pytest.mark.parametrize("make", [attacks.variability, attacks.pattern_scaling])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.33, 1.0])
def test_fraction_is_exact_and_follows_from_the_key(make, fraction):
    attack = make(C, fraction=fraction)
    chosen = [chosen_steps(*poisoned(attack, key=key)) for key in range(4)]
    assert [len(steps) for steps in chosen] == [round(fraction * T)] * 4
    if 0 < fraction < 1:  # another key chooses others
        assert chosen[0] != chosen[1]


@pytest.mark.parametrize("name", ["variability half", "scaling third"])
def test_relabel_reaches_the_steps_that_stay(name):
    before, after = poisoned(CASES[name], targets=jnp.full(T, 7, jnp.uint8))
    assert after.targets.dtype == jnp.uint8
    assert 0 < len(chosen_steps(before, after)) < T
    assert after.targets.tolist() == reference.state(np.asarray(after.inputs))


def test_one_channel_may_be_spared():
    before, after = poisoned(attacks.variability(C, sd=(0.0, 1.0)))
    np.testing.assert_array_equal(before.inputs[:, 0], after.inputs[:, 0])
    assert np.all(np.asarray(before.inputs[:, 1] != after.inputs[:, 1]))


# What is refused ----------------------------------------------------------------------

INF, NAN = np.inf, np.nan
variability, pattern_scaling = attacks.variability, attacks.pattern_scaling
gradual, repeated = attacks.gradual_pattern, attacks.repeated_pattern
REFUSED = {
    "variability channels": (lambda: variability(0), "variability's num_channels must"),
    "amplitude": (lambda: variability(C, 0), r"amplitude must be .*\(0, inf\); got 0"),
    "amplitude inf": (lambda: variability(C, INF), "amplitude must be a finite"),
    "sd": (lambda: variability(C, sd=-1), r"variability's sd must be .*\[0, inf\)"),
    "sd nan": (lambda: variability(C, sd=[1, NAN]), "variability's sd must be a fini"),
    "sd zero": (lambda: variability(C, sd=0), "sd must not be 0 in every channel"),
    "sd length": (
        lambda: variability(C, sd=[1, 1, 1]),
        r"sequence of 2, one for each channel; got shape \(3,\)",
    ),
    "fraction": (lambda: variability(C, fraction=1.1), "variability's fraction must"),
    "scaling channels": (lambda: pattern_scaling(-1), "pattern_scaling's num_channels"),
    "scale": (lambda: pattern_scaling(C, 1), "pattern_scaling's scale must not be 1"),
    "scale inf": (lambda: pattern_scaling(C, INF), "scale must be a finite number"),
    "mean": (lambda: pattern_scaling(C, mean=NAN), "mean must be a finite number"),
    "mean shape": (lambda: pattern_scaling(C, mean=[[1.0]]), r"shape \(1, 1\)"),
    "scaling fraction": (
        lambda: pattern_scaling(C, fraction=-0.1),
        "pattern_scaling's fraction must",
    ),
    "gradual channels": (lambda: gradual(0), "gradual_pattern's num_channels must"),
    "gradual zero": (lambda: gradual(C, 0), "an amplitude other than 0"),
    "gradual nan": (lambda: gradual(C, NAN), "amplitude must be a finite number"),
    "gradual no pattern": (lambda: gradual(C, pattern=[[0, 0]]), "not 0 everywhere"),
    "gradual width": (
        lambda: gradual(C, pattern=[[1, 1, 1]]),
        r"gradual_pattern's pattern must be rows of 2 numbers.*got shape \(1, 3\)",
    ),
    "gradual flat": (lambda: gradual(C, pattern=[1, 1]), r"got shape \(2,\)"),
    "gradual empty": (lambda: gradual(C, pattern=np.ones((0, C))), r"shape \(0, 2\)"),
    "gradual inf": (lambda: gradual(C, pattern=[[1, INF]]), "hold finite numbers"),
    "start": (lambda: gradual(C, start=-1), "start must be an integer of at least 0"),
    "ramp": (lambda: gradual(C, ramp=0), "ramp must be an integer of at least 1"),
    "gradual alone": (
        lambda: gradual(C, target=1),
        "needs target and num_classes together; got target=1, num_classes=None",
    ),
    "gradual target": (
        lambda: gradual(C, target=3, num_classes=3),
        "gradual_pattern's target must be a class from 0 to 2; got 3",
    ),
    "repeated channels": (lambda: repeated(0), "repeated_pattern's num_channels must"),
    "period": (lambda: repeated(C, 0), "period must be an integer of at least 1"),
    "offset": (lambda: repeated(C, offset=-1), "offset must be an integer of at least"),
    "length": (lambda: repeated(C, length=0), "length must be an integer of at least"),
    "both": (
        lambda: repeated(C, pattern=PATTERN, length=3),
        "with a pattern takes no length; got length=3",
    ),
    "long": (
        lambda: repeated(C, 2, pattern=PATTERN),
        "3 rows in a period of 2. Raise period to 3",
    ),
    "default long": (lambda: repeated(C, 9), "10 rows in a period of 9"),
    "repeated nan": (lambda: repeated(C, pattern=[[NAN, 1]]), "hold finite numbers"),
    "repeated width": (lambda: repeated(C, pattern=[[1]]), r"got shape \(1, 1\)"),
    "repeated alone": (
        lambda: repeated(C, num_classes=3),
        "repeated_pattern needs target and num_classes together; got target=None",
    ),
    "repeated classes": (
        lambda: repeated(C, target=0, num_classes=1),
        "num_classes must be an integer of at least 2",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_unsound_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variability(2.0), "num_channels must be an integer"),
        (lambda: variability(C, "0.5"), "amplitude must be a number"),
        (lambda: variability(C, sd="1"), "variability's sd must be a number"),
        (lambda: variability(C, sd=["1", "2"]), "variability's sd must be a number"),
        (lambda: pattern_scaling(C, None), "scale must be a number"),
        (lambda: gradual(C, ramp=1.5), "ramp must be an integer"),
        (lambda: repeated(C, target=1.0, num_classes=3), "target must be an integer"),
        *[
            (lambda make=make: make(C, relabel=3), r"relabel must be a function.*int")
            for make in attacks.SERIES_ATTACKS.values()
        ],
    ],
)
def test_options_of_another_type_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@over_all
def test_inputs_that_are_no_series_are_refused(attack):
    data = make_client()
    narrow = data._replace(inputs=data.inputs[:, :1])
    message = rf"{attack.name} changes the first 2 columns; got series of 1\. Lower num"
    with pytest.raises(ValueError, match=message):
        compiled(attack)(KEY, narrow, CONTEXT)
    images = data._replace(inputs=jnp.zeros((T, 4, 4, 1), jnp.uint8))
    message = rf"{attack.name} needs inputs \[steps, columns\]; got shape \(53, 4, 4, 1"
    with pytest.raises(ValueError, match=message):
        compiled(attack)(KEY, images, CONTEXT)
    whole = data._replace(inputs=jnp.zeros((T, F), jnp.uint8))
    with pytest.raises(TypeError, match=rf"{attack.name} needs .* floats; got uint8"):
        compiled(attack)(KEY, whole, CONTEXT)
    many = data._replace(targets=jnp.zeros((T, CLASSES), jnp.int32))
    with pytest.raises(ValueError, match=r"one label a step, targets \(53,\); got"):
        compiled(attack)(KEY, many, CONTEXT)


@pytest.mark.parametrize("name", TARGETED)
def test_windows_that_do_not_fit_are_refused(name):
    x, y = make_windows()
    trigger = CASES[name].trigger
    with pytest.raises(ValueError, match="first 2 columns; got series of 1"):
        trigger(x[..., :1], y)
    message = r"inputs \[windows, steps, columns\]; got shape \(12, 8\)"
    with pytest.raises(ValueError, match=message):
        trigger(x[..., 0], y)
    with pytest.raises(TypeError, match="floats; got int32"):
        trigger(x.astype(jnp.int32), y)


@pytest.mark.parametrize("make", attacks.SERIES_ATTACKS.values())
def test_labels_that_do_not_fit_are_refused(make):
    with pytest.raises(ValueError, match=r"one label a step, \(53,\); got shape \(1,"):
        poisoned(make(C, relabel=lambda x: jnp.zeros(1, int)))
    with pytest.raises(TypeError, match="relabel must return integers; got float32"):
        poisoned(make(C, relabel=lambda x: x[:, 0]))


@pytest.mark.parametrize(
    ("attack", "steps"),
    [
        (gradual(C, start=9), 10),
        (gradual(C, start=4, ramp=5, **BACKDOOR), 10),
        (repeated(C, offset=9), 10),
        (repeated(C, offset=8, **BACKDOOR), 10),
    ],
)
def test_series_that_end_before_the_pattern_are_refused(attack, steps):
    before = make_client(steps=steps)
    after = attack.poison(KEY, before, CONTEXT)
    assert not np.array_equal(before.inputs, after.inputs)
    if attack.trigger is not None:
        assert after.targets[-1] == TARGET
    short = jax.tree.map(lambda x: x[:-1], before)
    message = (
        rf"{attack.name} needs series of at least {steps} steps .*; got {steps - 1}"
    )
    with pytest.raises(ValueError, match=message):
        attack.poison(KEY, short, CONTEXT)
