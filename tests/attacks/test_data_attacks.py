"""One contract for every data attack, and every mode of label_flip.

What the attacks with a pixel trigger do beyond it is in test_backdoors.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import attacks
from fedjax_sim.types import ClientData, RoundContext
from tests.references import attacks as reference

L = 7
CASES = {
    "symmetric": attacks.label_flip(L),
    "shift": attacks.label_flip(L, mode="shift"),
    "targeted": attacks.label_flip(L, mode="targeted", source=3, target=5),
    "random": attacks.label_flip(L, mode="random"),
    "half": attacks.label_flip(L, fraction=0.5),
    "badnets": attacks.badnets(L, target=5, size=1),
    "badnets soft": attacks.badnets(L, target=5, mask=[[0.5, 0.0], [0.0, 1.0]]),
    "dba": attacks.dba(L, parts=[[(0, 0)], [(0, 1), (1, 0)]]),
    "hybrid": attacks.hybrid(L, 3, 5, 2, size=1),
    "hybrid half": attacks.hybrid(L, 3, 5, 2, assignment="half_clients", size=1),
    "scheduled": attacks.schedule(attacks.label_flip(L), stop=5),
}
# Those that change labels only.
LABELS = [name for name, attack in CASES.items() if attack.name == "label_flip"]
CONTEXT = RoundContext(round=jnp.array(0), rank=jnp.array(1))
M, SIZE = 60, 50  # rows of a client, of which the last ten are padding

over_all = pytest.mark.parametrize("attack", CASES.values(), ids=CASES.keys())


def make_client(seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    valid = np.arange(M) < size
    return ClientData(
        inputs=jnp.asarray(rng.integers(0, 256, (M, 2, 2, 1)), jnp.uint8),
        targets=jnp.asarray(np.where(valid, rng.integers(0, L, M), 0), jnp.int32),
        mask=jnp.asarray(valid),
    )


@functools.cache
def compiled(attack):
    return jax.jit(attack.poison)


def poisoned(attack, seed=0, key=0, **changes):
    data = make_client(seed)._replace(**changes)
    return data, compiled(attack)(jax.random.key(key), data, CONTEXT)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_table_is_complete():
    assert {attack.name for attack in CASES.values()} == set(attacks.DATA_ATTACKS)


@over_all
def test_structure_dtype_range_and_padding(attack):
    before, after = poisoned(attack)
    for old, new in zip(before, after, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    np.testing.assert_array_equal(before.mask, after.mask)
    np.testing.assert_array_equal(before.targets[SIZE:], after.targets[SIZE:])
    np.testing.assert_array_equal(before.inputs[SIZE:], after.inputs[SIZE:])
    assert np.all((after.targets >= 0) & (after.targets < L))


@pytest.mark.parametrize("name", LABELS)
def test_label_flip_leaves_inputs_alone(name):
    before, after = poisoned(CASES[name])
    np.testing.assert_array_equal(before.inputs, after.inputs)
    assert not np.array_equal(before.targets, after.targets)


@over_all
def test_jit_equals_eager(attack):
    before, jitted = poisoned(attack)
    eager = attack.poison(jax.random.key(0), before, CONTEXT)
    assert_same(jitted, eager)


@over_all
def test_vmap_over_clients_equals_loop(attack):
    keys = jax.random.split(jax.random.key(1), 3)
    clients = [make_client(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *clients)
    contexts = RoundContext(round=jnp.zeros(3, int), rank=jnp.arange(3))
    together = jax.vmap(attack.poison)(keys, stacked, contexts)
    for i, client in enumerate(clients):
        context = jax.tree.map(lambda x, i=i: x[i], contexts)
        alone = compiled(attack)(keys[i], client, context)
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone)


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

    play(make_client(), jax.random.key(0))
    play(make_client(1), jax.random.key(1))
    assert len(traces) == 1


@over_all
def test_same_key_same_poison(attack):
    _, first = poisoned(attack, key=5)
    _, second = poisoned(attack, key=5)
    assert_same(first, second)


@over_all
def test_unpadded_client_without_mask(attack):
    """The engine passes mask=None where no client is padded."""
    _, masked = poisoned(attack, mask=jnp.ones(M, bool))
    _, unmasked = poisoned(attack, mask=None)
    assert unmasked.mask is None
    assert_same(unmasked, masked._replace(mask=None))


@over_all
def test_validate_wants_the_same_number_of_classes(attack):
    attack.validate(L)
    with pytest.raises(ValueError, match="Pass num_classes=10"):
        attack.validate(10)


@over_all
def test_trigger_keeps_the_form_of_a_test_set(attack):
    data = make_client()
    if attack.trigger is None:
        return
    x, wanted, counts = jax.jit(attack.trigger)(data.inputs, data.targets)
    assert (x.shape, x.dtype) == (data.inputs.shape, data.inputs.dtype)
    assert (wanted.shape, wanted.dtype) == (data.targets.shape, data.targets.dtype)
    assert (counts.shape, counts.dtype) == (data.targets.shape, jnp.bool_)
    assert np.any(counts)
    # Where the model is right, nothing may count as success.
    assert not np.any(np.asarray(counts & (wanted == data.targets)))


@pytest.mark.parametrize("mode", ["symmetric", "shift", "targeted"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_equals_the_oracle(mode, dtype):
    targets = make_client(3).targets.astype(dtype)
    _, after = poisoned(CASES[mode], seed=3, targets=targets)
    assert after.targets.dtype == dtype
    expected = reference.label_flip(targets[:SIZE].tolist(), mode, L, 3, 5)
    assert after.targets[:SIZE].tolist() == expected


def test_random_is_uniform_over_the_other_classes():
    y = jnp.repeat(jnp.arange(L), 3000)
    data = ClientData(jnp.zeros((len(y), 1)), y, jnp.ones(len(y), bool))
    after = CASES["random"].poison(jax.random.key(2), data, RoundContext()).targets
    counts = np.zeros((L, L))
    np.add.at(counts, (np.asarray(y), np.asarray(after)), 1)
    np.testing.assert_array_equal(np.diag(counts), 0)
    # Expected 500 in each of the others, standard deviation 20.
    others = counts[~np.eye(L, dtype=bool)]
    assert others.min() > 400
    assert others.max() < 600


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.33, 1.0])
def test_fraction_is_exact_and_drawn_from_the_valid_samples(fraction):
    attack = attacks.label_flip(L, mode="shift", fraction=fraction)
    chosen = np.stack(
        [
            np.asarray(before.targets != after.targets)
            for before, after in (poisoned(attack, key=key) for key in range(4))
        ]
    )
    np.testing.assert_array_equal(chosen.sum(axis=1), round(fraction * SIZE))
    assert not chosen[:, SIZE:].any()
    if 0 < fraction < 1:  # another key chooses others
        assert not np.array_equal(chosen[0], chosen[1])


def test_fraction_of_a_targeted_flip_counts_the_source_class():
    attack = attacks.label_flip(L, mode="targeted", source=3, target=5, fraction=0.5)
    before, after = poisoned(attack, seed=4)
    valid = np.asarray(before.mask)
    source = (np.asarray(before.targets) == 3) & valid
    flipped = np.asarray(before.targets != after.targets)
    assert flipped.sum() == round(0.5 * source.sum()) > 0
    assert np.all(source[flipped])
    assert np.all(np.asarray(after.targets)[flipped] == 5)


def test_client_without_the_source_class_is_left_alone():
    attack = attacks.label_flip(L, mode="targeted", source=3, target=5, fraction=0.5)
    before, after = poisoned(attack, targets=jnp.full(M, 2))
    np.testing.assert_array_equal(before.targets, after.targets)


# Any number of labels a sample


def with_labels(seed=0):
    """The client with targets ``[M, L]``; some have 3 and 5, some neither."""
    data = make_client(seed)
    bits = np.random.default_rng(seed).uniform(size=(M, L)) < 0.4
    targets = jnp.asarray(bits & np.asarray(data.mask)[:, None], jnp.int32)
    return data._replace(targets=targets)


MULTILABEL = [name for name in CASES if name not in LABELS and name != "scheduled"]
MULTILABEL += ["targeted"]


@pytest.mark.parametrize("name", MULTILABEL)
def test_multilabel_targets_keep_their_form(name):
    before = with_labels()
    attack, key = CASES[name], jax.random.key(0)
    after = compiled(attack)(key, before, CONTEXT)
    assert_same(after, attack.poison(key, before, CONTEXT))
    for old, new in zip(before, after, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
    changed = np.any(np.asarray(before.targets != after.targets), axis=1)
    assert changed.any()
    assert not changed[SIZE:].any()
    assert set(np.unique(after.targets)) == {0, 1}
    # A client without padding, whose samples are not to be counted by its labels.
    full = before._replace(mask=jnp.ones(M, bool))
    bare = attack.poison(key, full._replace(mask=None), CONTEXT)
    assert_same(bare._replace(mask=full.mask), attack.poison(key, full, CONTEXT))


@pytest.mark.parametrize("name", MULTILABEL)
def test_multilabel_triggers_give_a_class_a_sample(name):
    data = with_labels()
    x, wanted, counts = jax.jit(CASES[name].trigger)(data.inputs, data.targets)
    assert (x.shape, x.dtype) == (data.inputs.shape, data.inputs.dtype)
    assert (wanted.shape, wanted.dtype) == ((M,), jnp.int32)
    assert (counts.shape, counts.dtype) == ((M,), jnp.bool_)
    rows = np.flatnonzero(counts)
    assert len(rows)
    # Where the model is right, nothing may count as success.
    assert not np.any(np.asarray(data.targets)[rows, np.asarray(wanted)[rows]])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_targeted_flip_moves_one_bit(fraction):
    attack = attacks.label_flip(L, "targeted", source=3, target=5, fraction=fraction)
    before = with_labels()
    after = compiled(attack)(jax.random.key(1), before, CONTEXT)
    np.testing.assert_array_equal(before.inputs, after.inputs)
    moved = 0
    for old, new in zip(before.targets.tolist(), after.targets.tolist()):
        if old != new:
            assert old[3] == 1
            old[3], old[5] = 0, 1
            moved += 1
        assert old == new
    assert moved == round(fraction * int(before.targets[:, 3].sum())) > 0


def test_success_of_a_targeted_flip_of_bits():
    x, y = make_client().inputs, with_labels().targets
    seen, wanted, counts = CASES["targeted"].trigger(x, y)
    assert seen is x
    assert wanted.tolist() == [5] * M
    assert counts.tolist() == [row[3] == 1 and row[5] == 0 for row in y.tolist()]


@pytest.mark.parametrize("name", ["symmetric", "shift", "random", "scheduled"])
def test_other_flips_of_multilabel_targets_are_refused(name):
    message = r"one label a sample; got multilabel targets of shape \(60, 7\). Use"
    with pytest.raises(ValueError, match=message):
        compiled(CASES[name])(jax.random.key(0), with_labels(), CONTEXT)


def targeted(source, target):
    return lambda: attacks.label_flip(L, "targeted", source, target)


REFUSED = {
    "one class": (
        lambda: attacks.label_flip(1),
        "num_classes must be an integer of at least 2",
    ),
    "mode": (lambda: attacks.label_flip(L, "symetric"), "Did you mean 'symmetric'"),
    "fraction": (
        lambda: attacks.label_flip(L, fraction=1.1),
        "must be a finite number",
    ),
    "fraction nan": (
        lambda: attacks.label_flip(L, fraction=np.nan),
        "fraction must be a finite number",
    ),
    "source": (lambda: attacks.label_flip(L, source=1), "takes no source"),
    "shift target": (
        lambda: attacks.label_flip(L, "shift", target=1),
        "takes no source",
    ),
    "no target": (targeted(1, None), "needs both source and target"),
    "no source": (targeted(None, 1), "needs both source and target"),
    "same": (targeted(2, 2), "two different classes from 0 to 6"),
    "out of range": (targeted(2, 7), "two different classes from 0 to 6"),
    "negative": (targeted(-1, 2), "source must be an integer of at least 0; got -1"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_unsound_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_classes_must_be_integers():
    with pytest.raises(TypeError, match="num_classes must be an integer"):
        attacks.label_flip(10.0)
    with pytest.raises(TypeError, match="source must be an integer"):
        attacks.label_flip(10, "targeted", "3", 2)
    attacks.label_flip(np.int64(10))
