"""What the compiled programs are made of: guards of their speed that need no clock."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.types import RoundContext

on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="what the CPU's compiler is given"
)


@pytest.fixture(scope="module")
def comparison():
    """Convolutions, an attack that takes moments of rows, two kinds of rules."""
    data = fs.data.load("digits")
    clients, root = fs.data.federate(data, num_clients=20, partition=fs.data.iid())
    shared = {
        "model": fs.models.digits_cnn(),
        "clients": clients,
        "root": root,
        "test": data.test,
        "client_update": fs.local_sgd(optax.sgd(0.1), steps=2, batch_size=10),
        "attack": fs.attacks.alie(z=1.5),
        "num_byzantine": 4,
    }
    rules = {"median": fs.aggregators.median(), "fltrust": fs.aggregators.fltrust()}
    return fs.compare(
        {n: fs.Simulation(aggregator=rule, **shared) for n, rule in rules.items()}
    )


@pytest.fixture(scope="module")
def program(comparison):
    states = comparison.init(jax.random.key(0))
    return comparison.lower(states, 3, 3).compile().as_text()


@on_cpu
def test_no_convolution_is_left_to_the_cpu(program):
    # Inside a loop XLA:CPU computes its gradients with a naive loop, 10 to 20 times as
    # slow as patches and a matrix product.
    assert " while(" in program
    assert "convolution(" not in program


def test_the_scan_never_leaves_the_device(program):
    for way_out in ("callback", "infeed", "outfeed", " send(", " recv("):
        assert way_out not in program


def test_the_state_is_overwritten_in_place(comparison, program):
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", program, re.DOTALL)
    assert aliases, program[:500]
    # Every array of the state that the rounds change, not only the odd one.
    states = comparison.init(jax.random.key(0))
    params = jax.tree.leaves([state.params for state in states.values()])
    assert aliases[1].count("alias") >= 3 * len(params)  # also the two previous ones


def test_a_later_run_reuses_the_program(comparison):
    states, _ = comparison.run(jax.random.key(0), num_rounds=3, eval_every=3)
    compiled = comparison._scan._cache_size()
    states, _ = comparison.run(states=states, num_rounds=3, eval_every=3)
    comparison.run(jax.random.key(1), num_rounds=3, eval_every=3)
    assert comparison._scan._cache_size() == compiled == 1


def test_only_a_donated_state_is_gone(comparison):
    states = comparison.init(jax.random.key(0))
    _, first = comparison.run(states=states, num_rounds=3, eval_every=3)
    _, again = comparison.run(states=states, num_rounds=3, eval_every=3, donate=True)
    np.testing.assert_array_equal(first["median"].accuracy, again["median"].accuracy)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(states["median"].params["head"]["Dense_0"]["kernel"])


@on_cpu
@pytest.mark.parametrize(
    "rule",
    [
        fs.aggregators.median(),
        fs.aggregators.trimmed_mean(2),
        fs.aggregators.meamed(2),
        fs.aggregators.phocas(2),
    ],
    ids=lambda rule: rule.name,
)
def test_coordinate_wise_rules_do_not_sort_on_cpu(rule):
    # XLA's sort over the client axis calls a comparator per pair, column by column.
    U = jnp.ones((9, 300))
    apply = jax.jit(lambda U: rule.apply(U, rule.init(U[0], 9), RoundContext()))
    assert not re.search(r"\bsort\(", apply.lower(U).compile().as_text())


@on_cpu
def test_rules_that_pass_their_mask_on_do_not_copy_the_matrix():
    # At 100 x 1.6 million the copy takes longer than FedAvg itself.
    rule = fs.aggregators.fedavg()
    U = jnp.ones((16, 5000))
    apply = jax.jit(lambda U: rule.apply(U, rule.init(U[0], 16), RoundContext())[0])
    text = apply.lower(U).compile().as_text()
    entry = text[text.index("ENTRY") :]
    # Only the branch for rows that are out may make one.
    assert not re.search(r"= f32\[16,5000\]\S* (?!parameter)", entry)


@on_cpu
def test_a_round_joins_the_updates_into_a_matrix_once(program):
    # Attacks and rules ravel what the engine unravels; a copy for each of them would
    # take as long as the simpler rules. 40 rows are those of both systems.
    joined = re.findall(r"= f32\[(\d+),1898\]\S* concatenate\(", program)
    assert [rows for rows in joined if rows in ("20", "40")] == ["40"]
