"""Simulations whose updates are held by no one: the same as those that hold them."""

import jax
import jax.numpy as jnp
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.types import UpdateAttack
from tests.trees import assert_close

a, attacks = fs.aggregators, fs.attacks


@pytest.fixture(scope="module")
def shared():
    data = fs.data.load("digits")
    clients, root = fs.data.federate(
        data, num_clients=21, partition=fs.data.dirichlet(1.0, min_size=10)
    )
    return {
        "model": fs.models.mlp((8, 8, 1), hidden=(8,)),
        "clients": clients,
        "root": root,
        "test": data.test,
        "client_update": fs.local_sgd(optax.sgd(0.1), steps=2, batch_size=10),
        "cohort_size": 15,
        "num_devices": 1,
    }


def run(shared, systems, **more):
    comparison = fs.compare(
        {n: fs.Simulation(**shared, **own, **more) for n, own in systems.items()}
    )
    return comparison, comparison.run(jax.random.key(1), num_rounds=2)


def test_held_by_no_one_is_the_same(shared):
    backdoor = {
        "num_byzantine": 4,
        "data_attack": attacks.badnets(target=0, num_classes=10, size=2),
        "byzantine_update": fs.local_sgd(optax.sgd(0.2), steps=4, batch_size=10),
    }
    systems = {
        "median": {
            "aggregator": a.median(),
            "attack": attacks.alie(z=1.5),
            "num_byzantine": 4,
        },
        "defended": {
            "aggregator": a.fedavg(),
            "client_defense": fs.client_defenses.sanitization(3, start=1),
            **backdoor,
        },
    }
    whole, expected = run(shared, systems)
    # 610 parameters: room for 4 of the 15 updates.
    passing, found = run(shared, systems, update_memory=4 * 610 * 4)
    assert not any(s.in_passes for s in whole.systems.values())
    assert all(s.in_passes for s in passing.systems.values())
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[1]["defended"].defense["poisoned_left_out"].sum() > 0


def test_what_fits_is_held(shared):
    options = {"aggregator": a.bulyan(max_byzantine=3), "update_memory": 4 * 610 * 15}
    assert not fs.Simulation(**shared, **options).in_passes
    options["update_memory"] -= 1
    with pytest.raises(ValueError, match="bulyan has no form that sees them in passes"):
        fs.Simulation(**shared, **options)


def test_what_cannot_be_in_passes(shared):
    small = {"aggregator": a.fedavg(), "update_memory": 4 * 610}
    fs.Simulation(**shared, **small)
    clients, local_test = fs.data.hold_out(shared["clients"])
    refused = {
        "at least one update of 610 parameters, 2,440 bytes; got 2,439": {
            "update_memory": 4 * 610 - 1
        },
        "update_memory .bytes. must be an integer of at least 1; got 0": {
            "update_memory": 0
        },
        r"the attack min_max \(omniscient\) has no form": {
            "attack": attacks.min_max(),
            "num_byzantine": 3,
        },
        "local_test asks for the model of every client": {
            "clients": clients,
            "local_test": local_test,
        },
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            fs.Simulation(**shared | small | options)


def test_an_attack_that_remembers_needs_a_form_of_its_own(shared):
    def counting(updates, state, context):
        return updates, state + 1

    attack = UpdateAttack(
        init=lambda params, n: jnp.zeros(()),
        apply=counting,
        validate=lambda k, f: None,
        knowledge="own",
        name="counting",
    )
    options = {"aggregator": a.fedavg(), "attack": attack, "num_byzantine": 2}
    fs.Simulation(**shared, **options)
    with pytest.raises(ValueError, match=r"counting \(own\) has no form"):
        fs.Simulation(**shared, **options, update_memory=4 * 610)


def test_forms_in_passes_are_checked_before_training(shared):
    rule, alie = a.fedavg(), attacks.alie(z=1.0)

    def short(rows, state, context):
        aggregate, state, info = rule.in_passes(rows, state, context)
        return aggregate[:-1], state, info

    def of_some(rows, state, context):
        aggregate, state, info = rule.in_passes(rows, state, context)
        return aggregate, state, info._replace(scores=info.scores[:4])

    def blind(rows, state, context):
        return jnp.zeros(rows.size), state, rule_info(rows)

    def rule_info(rows):
        share = jnp.full(len(rows), 1 / len(rows))
        return fs.types.AggregatorInfo(share, share > 1, share)

    with pytest.raises(ValueError, match="known after the first pass"):
        fs.Simulation(
            **shared, aggregator=rule._replace(in_passes=blind), update_memory=4 * 610
        )

    def one_row(rows, state, context):
        return lambda updates, places: updates[0]

    for message, options in {
        "aggregator fedavg, in passes: aggregate": {
            "aggregator": rule._replace(in_passes=short)
        },
        r"info scores must have shape \(15,\)": {
            "aggregator": rule._replace(in_passes=of_some)
        },
        "attack alie, in passes: updates": {
            "aggregator": rule,
            "attack": alie._replace(in_passes=one_row),
            "num_byzantine": 3,
        },
    }.items():
        with pytest.raises(TypeError, match=message):
            fs.Simulation(**shared, **options, update_memory=4 * 610)
