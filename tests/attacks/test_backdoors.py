"""The attacks with a pixel trigger, against their examples and plain loops."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim import attacks
from fedjax_sim.attacks.dba import bars
from fedjax_sim.types import ClientData, Examples, RoundContext
from tests.pages import EXAMPLES, check, inputs, options
from tests.references import poisoned as reference

L, S = 5, 40  # classes and samples
KEY = jax.random.key(0)
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")


def images(dtype=jnp.uint8, shape=(6, 10, 2), seed=0, **changes):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (S, *shape))
    x = jnp.asarray(x if dtype == jnp.uint8 else x / 255, dtype)
    y = jnp.asarray(rng.integers(0, L, S), jnp.int32)
    return ClientData(x, y, None)._replace(**changes)


TOLERANCE = {jnp.uint8: 0, jnp.bfloat16: 2**-7, jnp.float32: 1e-6}


def assert_data(got, expected, dtype, uint8_tolerance=0):
    """Equal to the oracle's images and labels; ``uint8`` exactly, unless blended."""
    tolerance = TOLERANCE[dtype] or uint8_tolerance
    assert got.inputs.dtype == dtype
    x = np.asarray(got.inputs.astype(jnp.float32))
    np.testing.assert_allclose(x, np.stack(expected[0]), rtol=0, atol=tolerance)
    assert got.targets.tolist() == list(expected[1])


# The worked examples ------------------------------------------------------------------


def test_badnets_example():
    identifier = "badnets/pixels"
    x, y, mask, pattern = (inputs(identifier)[i] for i in ("x", "y", "mask", "pattern"))
    target = options(identifier)["target"]
    attack = attacks.badnets(10, target, 1.0, mask=mask, pattern=pattern)
    data = ClientData(jnp.array([x]), jnp.array(y), None)
    got = attack.poison(KEY, data, RoundContext())
    check(identifier, x=got.inputs[0], y=got.targets)
    stamped, labels = reference.badnets([x], y, [0], mask, pattern, target)
    check(identifier, x=stamped[0], y=labels)


def test_dba_example():
    identifier = "dba/patterns"
    x, parts = inputs(identifier)["x"], options(identifier)["patterns"]
    attack = attacks.dba(10, fraction=1.0, parts=parts)
    data = ClientData(jnp.array([x]), jnp.array([5]), None)
    local = [
        attack.poison(KEY, data, RoundContext(rank=jnp.array(rank))).inputs[0]
        for rank in (0, 3)
    ]
    whole = attack.trigger(data.inputs, data.targets)[0][0]
    check(identifier, local=local, glob=whole)
    local = [reference.dba([x], [5], [0], parts, rank, 2)[0][0] for rank in (0, 3)]
    mask = reference.pixels(*np.shape(x), reference.union(parts))
    check(identifier, local=local, glob=reference.stamp(x, mask, np.ones_like(mask)))


def with_choice(monkeypatch, indices):
    """Feeds the hybrid attack the samples that an example draws for the backdoor."""

    def choose(key, eligible, fraction):
        chosen = jnp.zeros(eligible.shape, bool).at[jnp.array(indices)].set(True)
        assert bool(jnp.all(eligible[jnp.array(indices)]))
        return chosen

    # By way of sys.modules: in the package the function hides the module.
    monkeypatch.setattr(sys.modules["fedjax_sim.attacks.hybrid"], "choose", choose)


def test_hybrid_example(monkeypatch):
    identifier = "hybrid/basic"
    given, hyper = inputs(identifier), options(identifier)
    with_choice(monkeypatch, given["backdoor_idx"])
    attack = attacks.hybrid(
        10,
        source=hyper["source"],
        flip_target=hyper["target"],
        target=hyper["backdoor_target"],
        mask=given["mask"],
        pattern=given["pattern"],
    )
    data = ClientData(jnp.array(given["x"]), jnp.array(given["y"]), None)
    got = attack.poison(KEY, data, RoundContext())
    check(identifier, x=got.inputs, y=got.targets)
    x, y = reference.hybrid(
        given["x"],
        given["y"],
        given["flip_idx"],
        given["backdoor_idx"],
        given["mask"],
        given["pattern"],
        hyper["target"],
        hyper["backdoor_target"],
    )
    check(identifier, x=x, y=y)


def test_every_example_of_these_attacks_is_used():
    found = {
        i for i, e in EXAMPLES.items() if e["algorithm"] in ("badnets", "dba", "hybrid")
    }
    assert found == {"badnets/pixels", "dba/patterns", "hybrid/basic"}


# Stamping -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 10, 2), (6, 10)])
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("corner", CORNERS)
def test_square_equals_the_oracle(dtype, corner, shape):
    data = images(dtype, shape)
    attack = attacks.badnets(L, 3, 1.0, size=2, corner=corner, value=0.6)
    got = jax.jit(attack.poison)(KEY, data, RoundContext())
    mask = reference.square(6, 10, 2, corner)
    full = 255.0 if dtype == jnp.uint8 else 1.0
    expected = reference.badnets(
        np.asarray(data.inputs.astype(jnp.float32)),
        data.targets.tolist(),
        range(S),
        mask,
        0.6 * np.ones_like(mask),
        3,
        full,
    )
    assert_data(got, expected, dtype)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_soft_mask_equals_the_oracle(dtype, shape):
    """One mask for all channels, or one of its own for each.

    A blend of ``uint8`` that lands on a half may be rounded either way.
    """
    rng = np.random.default_rng(1)
    mask, pattern = rng.random(shape).round(2), rng.random(shape)
    mask[0, 0], mask[1, 1] = 0.0, 1.0
    data = images(dtype, (4, 5, 3))
    got = attacks.badnets(L, 0, 1.0, mask=mask, pattern=pattern).poison(
        KEY, data, RoundContext()
    )
    mask, pattern = np.float32(mask), np.float32(pattern)
    full = 255.0 if dtype == jnp.uint8 else 1.0
    expected = reference.badnets(
        np.asarray(data.inputs), data.targets.tolist(), range(S), mask, pattern, 0, full
    )
    assert_data(got, expected, dtype, uint8_tolerance=1)
    one = attacks.badnets(L, 0, 1.0, mask=mask, value=0.25)
    x = one.trigger(data.inputs, data.targets)[0]
    quarter = 0.25 * np.ones(shape)
    wanted = [reference.stamp(i, mask, quarter, full) for i in np.asarray(data.inputs)]
    np.testing.assert_allclose(x, wanted, rtol=0, atol=TOLERANCE[dtype] or 1)


def test_one_trigger_is_the_same_for_both_ways_of_storing_images():
    attack = attacks.badnets(L, 1, value=0.5, size=1)
    stored, floats = images(), images(jnp.float32)
    pair = [attack.trigger(d.inputs, d.targets)[0] for d in (stored, floats)]
    np.testing.assert_allclose(pair[0] / 255, pair[1], atol=0.5 / 255)


def test_pixels_that_are_not_finite_are_replaced_or_stay():
    x = jnp.array([[[np.inf, np.inf], [np.nan, 0.5]]])
    attack = attacks.badnets(L, 1, 1.0, mask=[[1, 0], [1, 0.5]])
    got = attack.trigger(x, jnp.array([0]))[0]
    np.testing.assert_array_equal(got, [[[1.0, np.inf], [1.0, 0.75]]])


# DBA ----------------------------------------------------------------------------------


def test_default_parts_are_the_paper_s():
    """Its own lists: mnist_params.yaml and cifar_params.yaml."""
    assert bars(4, 2) == (
        ((0, 0), (0, 1), (0, 2), (0, 3)),
        ((0, 6), (0, 7), (0, 8), (0, 9)),
        ((3, 0), (3, 1), (3, 2), (3, 3)),
        ((3, 6), (3, 7), (3, 8), (3, 9)),
    )
    assert bars(6, 3)[3] == tuple((4, column) for column in range(9, 15))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_dba_parts_by_rank_equal_the_oracle(dtype):
    data, attack = images(dtype), attacks.dba(L, 1, fraction=1.0, value=0.8)
    full = 255.0 if dtype == jnp.uint8 else 1.0
    poison = jax.jit(jax.vmap(attack.poison, (None, None, RoundContext(rank=0))))
    got = poison(KEY, data, RoundContext(rank=jnp.arange(6)))
    for rank in range(6):
        expected = reference.dba(
            np.asarray(data.inputs),
            data.targets.tolist(),
            range(S),
            bars(4, 2),
            rank,
            1,
            0.8,
            full,
        )
        assert_data(jax.tree.map(lambda x, r=rank: x[r], got), expected, dtype)


def test_a_part_alone_is_not_the_trigger():
    data, attack = images(), attacks.dba(L, 1, fraction=1.0)
    whole = attack.trigger(data.inputs, data.targets)[0]
    for rank in range(4):
        part = attack.poison(KEY, data, RoundContext(rank=jnp.array(rank))).inputs
        assert not np.array_equal(part, whole)


# Who is counted -----------------------------------------------------------------------


def test_success_counts_other_classes_stamped():
    data = images()
    for attack in (attacks.badnets(L, 3), attacks.dba(L, 3)):
        x, wanted, counts = attack.trigger(data.inputs, data.targets)
        assert wanted.tolist() == [3] * S
        assert counts.tolist() == [y != 3 for y in data.targets.tolist()]
        changed = np.any(np.asarray(x) != np.asarray(data.inputs), axis=(1, 2, 3))
        assert changed.all()


@pytest.mark.parametrize("target", [0, 1, 3])
def test_success_of_hybrid(target):
    """Source class unstamped and wanted as the flip says; the others stamped."""
    data, attack = images(), attacks.hybrid(L, 3, 1, target)
    x, wanted, counts = attack.trigger(data.inputs, data.targets)
    stamped = np.any(np.asarray(x) != np.asarray(data.inputs), axis=(1, 2, 3))
    for i, y in enumerate(data.targets.tolist()):
        assert wanted[i] == (1 if y == 3 else target)
        assert counts[i] == (y == 3 or y != target)
        assert stamped[i] == (y != 3)


def test_success_of_a_targeted_flip():
    data = images()
    attack = attacks.label_flip(L, "targeted", source=3, target=1)
    x, wanted, counts = attack.trigger(data.inputs, data.targets)
    assert x is data.inputs
    assert wanted.tolist() == [1] * S
    assert counts.tolist() == [y == 3 for y in data.targets.tolist()]
    for mode in ("symmetric", "shift", "random"):
        assert attacks.label_flip(L, mode).trigger is None


# Hybrid -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("assignment", ["both", "half_clients"])
def test_hybrid_flips_the_source_and_stamps_a_share_of_the_rest(assignment, rank):
    data = images(mask=jnp.arange(S) < 35)
    attack = attacks.hybrid(L, 3, 1, 0, fraction=0.5, assignment=assignment)
    got = attack.poison(KEY, data, RoundContext(rank=jnp.array(rank)))
    y = np.asarray(data.targets)
    source = (y == 3) & np.asarray(data.mask)
    others = (y != 3) & np.asarray(data.mask)
    stamped = np.any(np.asarray(got.inputs) != np.asarray(data.inputs), axis=(1, 2, 3))
    flips = assignment == "both" or rank % 2 == 0
    stamps = assignment == "both" or rank % 2 == 1
    assert stamped.sum() == (round(0.5 * others.sum()) if stamps else 0)
    assert not np.any(stamped & ~others)
    expected = np.where(stamped, 0, np.where(source & flips, 1, y))
    np.testing.assert_array_equal(got.targets, expected)


# Any number of labels a sample --------------------------------------------------------


def labelled(mask=None):
    """``images()`` with targets ``[S, L]`` of 0 and 1."""
    bits = np.random.default_rng(7).uniform(size=(S, L)) < 0.4
    return images(targets=jnp.asarray(bits, jnp.int32), mask=mask)


def stamped_rows(one, other):
    return np.any(np.asarray(one) != np.asarray(other), axis=(1, 2, 3))


def only(label):
    return [int(i == label) for i in range(L)]


@pytest.mark.parametrize("attack", [attacks.badnets(L, 3, 0.5), attacks.dba(L, 3, 0.5)])
def test_stamped_samples_have_one_label(attack):
    data, context = labelled(mask=jnp.arange(S) < 30), RoundContext(rank=jnp.array(0))
    got = attack.poison(KEY, data, context)
    stamped = stamped_rows(got.inputs, data.inputs)
    assert stamped.sum() == 15
    assert not stamped[30:].any()
    for row, old, new in zip(stamped, data.targets.tolist(), got.targets.tolist()):
        assert new == (only(3) if row else old)
    x, wanted, counts = attack.trigger(data.inputs, data.targets)
    assert stamped_rows(x, data.inputs).all()
    assert (wanted.tolist(), wanted.dtype) == ([3] * S, jnp.int32)
    assert counts.tolist() == [row[3] == 0 for row in data.targets.tolist()]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("assignment", ["both", "half_clients"])
def test_hybrid_moves_bits_and_stamps_a_share_of_the_rest(assignment, rank):
    data = labelled(mask=jnp.arange(S) < 35)
    attack = attacks.hybrid(L, 3, 1, 0, fraction=0.5, assignment=assignment)
    got = attack.poison(KEY, data, RoundContext(rank=jnp.array(rank)))
    stamped = stamped_rows(got.inputs, data.inputs)
    flips = assignment == "both" or rank == 0
    others = (np.asarray(data.targets)[:35, 3] == 0).sum()
    assert stamped.sum() == (round(0.5 * others) if assignment == "both" or rank else 0)
    for i, old in enumerate(data.targets.tolist()):
        expected = list(old)
        if stamped[i]:
            assert old[3] == 0
            expected = only(0)
        elif old[3] and flips and i < 35:
            expected[3], expected[1] = 0, 1
        assert got.targets[i].tolist() == expected


def test_success_of_hybrid_by_bits():
    data = labelled()
    x, wanted, counts = attacks.hybrid(L, 3, 1, 0).trigger(data.inputs, data.targets)
    stamped = stamped_rows(x, data.inputs)
    kinds = set()
    for i, y in enumerate(data.targets.tolist()):
        want = 1 if y[3] else 0
        assert wanted[i] == want
        assert counts[i] == (y[want] == 0)
        assert stamped[i] == (y[3] == 0)
        kinds.add((y[3], bool(counts[i])))
    assert len(kinds) == 4


# What is refused ----------------------------------------------------------------------

HYBRID = {"source": 1, "flip_target": 2, "target": 0}
EYE = np.eye(2)
REFUSED = {
    "classes": (lambda: attacks.badnets(1, 0), "num_classes must be an integer of at"),
    "target": (lambda: attacks.badnets(L, L), "target must be a class from 0 to 4"),
    "negative": (lambda: attacks.dba(L, -1), "dba's target must be .*; got -1"),
    "fraction": (lambda: attacks.badnets(L, 0, 1.5), "fraction must be .*; got 1.5"),
    "dba fraction": (lambda: attacks.dba(L, fraction=-0.1), "fraction must be"),
    "size": (lambda: attacks.badnets(L, 0, size=0), "size must be an integer of at"),
    "corner": (lambda: attacks.badnets(L, 0, corner="top"), "unknown corner of badn"),
    "value": (lambda: attacks.badnets(L, 0, value=np.nan), "value must be"),
    "bare": (lambda: attacks.badnets(L, 0, pattern=EYE), "pattern needs a mask"),
    "mask size": (lambda: attacks.badnets(L, 0, size=2, mask=EYE), "no size and corn"),
    "mask value": (
        lambda: attacks.badnets(L, 0, value=0.5, mask=EYE, pattern=EYE),
        "with a pattern takes no value",
    ),
    "mask range": (lambda: attacks.badnets(L, 0, mask=2 * EYE), "mask must be from 0"),
    "mask empty": (lambda: attacks.badnets(L, 0, mask=0 * EYE), "not 0 everywhere"),
    "mask nan": (lambda: attacks.badnets(L, 0, mask=[np.nan]), "finite numbers"),
    "shapes": (
        lambda: attacks.badnets(L, 0, mask=EYE, pattern=[1.0, 1.0]),
        r"shape of its mask, \(2, 2\); got \(2,\)",
    ),
    "length": (lambda: attacks.dba(L, length=0), "length must be an integer of at"),
    "gap": (lambda: attacks.dba(L, gap=-1), "gap must be an integer of at least 0"),
    "both": (lambda: attacks.dba(L, gap=1, parts=[[(0, 0)]]), "takes no length and"),
    "no part": (lambda: attacks.dba(L, parts=[]), "at least one part"),
    "no pixel": (lambda: attacks.dba(L, parts=[[(0, 0)], []]), "a pixel in every"),
    "no pair": (lambda: attacks.dba(L, parts=[[(0, 0, 0)]]), r"pixels \(row, column"),
    "row": (lambda: attacks.dba(L, parts=[[(-1, 0)]]), "row or column must be"),
    "same": (lambda: attacks.hybrid(L, 1, 1, 0), "flip_target other than source"),
    "source": (lambda: attacks.hybrid(L, L, 1, 0), "source must be a class"),
    "flip": (lambda: attacks.hybrid(L, 1, L, 0), "flip_target must be a class"),
    "assign": (
        lambda: attacks.hybrid(L, **HYBRID, assignment="half"),
        "unknown assignment of hybrid 'half'. Did you mean 'half_clients'",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_unsound_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_classes_and_pixels_must_be_integers():
    with pytest.raises(TypeError, match="badnets' target must be an integer"):
        attacks.badnets(L, 1.0)
    with pytest.raises(TypeError, match="row or column must be an integer"):
        attacks.dba(L, parts=[[(0.5, 0)]])


MISFITS = {
    "square": (attacks.badnets(L, 0, size=7), {}, "square of 7 x 7 is larger than"),
    "bars": (attacks.dba(L), {"shape": (6, 8, 1)}, "column 8, outside the images of 6"),
    "parts": (attacks.dba(L, parts=[[(6, 0)]]), {}, "row 6, .*Pass other parts"),
    "flat": (attacks.badnets(L, 0), {"shape": (60,)}, r"samples of shape \(60,\)"),
    "mask": (attacks.badnets(L, 0, mask=EYE), {}, r"mask of shape \(2, 2\), but"),
    "scale": (attacks.badnets(L, 0, value=200), {}, "Divide them by 255"),
}


@pytest.mark.parametrize(("attack", "how", "message"), MISFITS.values(), ids=MISFITS)
def test_a_trigger_that_does_not_fit_is_refused(attack, how, message):
    data, context = images(**how), RoundContext(rank=jnp.array(0))
    with pytest.raises(ValueError, match=message):
        attack.poison(KEY, data, context)
    with pytest.raises(ValueError, match=message):
        attack.trigger(data.inputs, data.targets)


def test_inputs_of_unknown_scale_are_refused():
    data = images(jnp.int32)
    with pytest.raises(TypeError, match="uint8 or float inputs; got int32"):
        attacks.badnets(L, 0).poison(KEY, data, RoundContext())


@pytest.mark.parametrize(
    "attack", [attacks.dba(L), attacks.hybrid(L, **HYBRID, assignment="half_clients")]
)
def test_missing_rank_is_named(attack):
    with pytest.raises(ValueError, match=rf"{attack.name} needs context\.rank"):
        attack.poison(KEY, images(), RoundContext())


# In a simulation ----------------------------------------------------------------------


def simulate(attack, test=None, **changes):
    data = fs.data.load("digits")
    clients, _ = fs.data.federate(data, num_clients=10, partition=fs.data.iid())
    return fs.Simulation(
        model=fs.models.mlp((8, 8, 1), hidden=()),
        clients=clients,
        test=test,
        client_update=fs.local_sgd(optax.sgd(0.1), steps=1, batch_size=9),
        aggregator=fs.aggregators.fedavg(),
        data_attack=attack,
        num_byzantine=3,
        **changes,
    )


def test_misfits_are_refused_before_training():
    with pytest.raises(ValueError, match=r"images of 8 x 8.*Pass length"):
        simulate(attacks.dba(10))
    simulate(attacks.dba(10, length=3))
    with pytest.raises(ValueError, match="Pass num_classes=10"):
        simulate(attacks.badnets(9, 0))
    # The test set is looked at on its own.
    test = Examples(np.zeros((4, 8, 8, 1), np.int32), np.zeros(4, int))
    with pytest.raises(TypeError, match="got int32"):
        simulate(attacks.badnets(10, 0), test)


def broken(change=lambda d: d, trigger=None):
    attack = attacks.badnets(10, 0)

    def poison(key, data, context):
        return change(attack.poison(key, data, context))

    return attack._replace(
        poison=poison, name="mine", trigger=trigger or attack.trigger
    )


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (broken(tuple), "data attack mine must return ClientData; got tuple"),
        (broken(lambda d: d._replace(inputs=d.inputs / 255)), "mine: data must have"),
        (broken(lambda d: jax.tree.map(lambda x: x[:3], d)), "mine: data must have"),
        (broken(trigger=lambda x, y: x), r"trigger must return \(inputs, wanted"),
        (broken(trigger=lambda x, y: (x[:, 0], y, y == 0)), "trigger's inputs must"),
        (broken(trigger=lambda x, y: (x, 0, y == 0)), "trigger's wanted must"),
        (broken(trigger=lambda x, y: (x, y, y)), "trigger's counts must"),
    ],
)
def test_a_data_attack_that_breaks_its_contract_is_named(attack, message):
    with pytest.raises(TypeError, match=message):
        simulate(attack, fs.data.load("digits").test)
