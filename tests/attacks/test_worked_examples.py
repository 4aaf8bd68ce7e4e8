"""The worked examples of the attacks, against the package and against the oracles."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import attacks
from fedjax_sim.attacks.alie import z_max
from fedjax_sim.types import ClientData, RoundContext
from tests.pages import EXAMPLES, VALIDATION, check, inputs
from tests.references import attacks as reference


def attacked(attack, own, honest=(), **context):
    """The first row after the attack, given the attackers' and the honest rows."""
    rows = jnp.array([*own, *honest], jnp.float32)
    byzantine = jnp.arange(len(rows)) < len(own)
    context = RoundContext(byzantine=byzantine, **context)
    attack.validate(len(rows), len(own))
    state = attack.init(rows[0], len(rows))
    return attack.apply(rows, state, context)[0][0]


def test_sign_flip_scale2():
    u = inputs("sign_flip/scale2")["u"]
    check("sign_flip/scale2", u_mal=attacked(attacks.sign_flip(2.0), [u], [u]))
    check("sign_flip/scale2", u_mal=reference.sign_flip(u, 2.0))


def test_sign_flip_weights():
    u, w = (inputs("sign_flip/weights")[name] for name in "uw")
    attack = attacks.sign_flip(space="weights")
    check("sign_flip/weights", u_mal=attacked(attack, [u], [u], params=jnp.array(w)))
    check("sign_flip/weights", u_mal=reference.sign_flip(u, space="weights", w=w))


def with_noise(monkeypatch, noise):
    """Feeds the gaussian attack the draws of an example."""

    def draw(key, client_ids, size):
        return jnp.broadcast_to(jnp.array(noise), (len(client_ids), size))

    # By way of sys.modules: in the package the function hides the module.
    module = sys.modules["fedjax_sim.attacks.gaussian"]
    monkeypatch.setattr(module, "normal_rows", draw)
    return {"key": jnp.zeros(2, jnp.uint32), "client_ids": jnp.arange(3)}


def test_gaussian_replace(monkeypatch):
    noise = inputs("gaussian/replace")["noise"]
    context = with_noise(monkeypatch, noise)
    attack = attacks.gaussian(mean=0.1, std=2.0)
    check("gaussian/replace", u_mal=attacked(attack, np.ones((3, 3)), **context))
    check("gaussian/replace", u_mal=reference.gaussian(noise, 0.1, 2.0))


def test_gaussian_fitted(monkeypatch):
    rows, noise = (inputs("gaussian/fitted")[name] for name in ("B", "noise"))
    context = with_noise(monkeypatch, noise)
    attack = attacks.gaussian(mode="fitted")
    check("gaussian/fitted", u_mal=attacked(attack, rows, **context))
    check("gaussian/fitted", u_mal=reference.gaussian_fitted(rows, noise))


@pytest.mark.parametrize("knowledge", ["omniscient", "colluding"])
def test_ipm(knowledge):
    rows = inputs("ipm/eps")["B"]
    other = [[50.0, -50.0]]
    attack = attacks.ipm(0.5, knowledge)
    own, honest = (rows, other) if knowledge == "colluding" else (other, rows)
    check("ipm/eps", u_mal=attacked(attack, own, honest))
    check("ipm/eps", u_mal=reference.ipm(rows, 0.5))


@pytest.mark.parametrize("knowledge", ["omniscient", "colluding"])
@pytest.mark.parametrize("identifier", ["lie/z1", "lie/minus_ddof1"])
def test_alie(identifier, knowledge):
    rows = inputs(identifier)["S"]
    options = EXAMPLES[identifier]["hyperparameters"]
    other = [[50.0, -50.0]]
    attack = attacks.alie(**options, knowledge=knowledge)
    own, honest = (rows, other) if knowledge == "colluding" else (other, rows)
    check(identifier, u_mal=attacked(attack, own, honest))
    check(identifier, u_mal=reference.alie(rows, **options))


def test_alie_z_max():
    pairs = EXAMPLES["lie/zmax"]["hyperparameters"]["pairs"]
    check("lie/zmax", z=[z_max(n, m) for n, m in pairs])
    s, p = zip(*(reference.alie_counts(n, m) for n, m in pairs))
    check("lie/zmax", s=s, p=p, z=[reference.alie_z(n, m) for n, m in pairs])


FLIPS = {
    "label_flip/symmetric": {"num_classes": 10},
    "label_flip/targeted": {
        "num_classes": 10,
        "mode": "targeted",
        "source": 3,
        "target": 2,
    },
    "label_flip/middle_class_odd_L": {"num_classes": 3},
}


@pytest.mark.parametrize("identifier", FLIPS)
def test_label_flip(identifier):
    y, options = inputs(identifier)["y"], FLIPS[identifier]
    data = ClientData(jnp.zeros((len(y), 2)), jnp.array(y), jnp.ones(len(y), bool))
    attack = attacks.label_flip(**options)
    key = jnp.zeros(2, jnp.uint32)
    check(identifier, y=attack.poison(key, data, RoundContext()).targets)
    check(identifier, y=reference.label_flip(y, **{"mode": "symmetric"} | options))


def test_every_example_of_these_attacks_is_used():
    ours = ("sign_flip", "gaussian", "ipm", "lie", "label_flip")
    found = {i for i, e in EXAMPLES.items() if e["algorithm"] in ours}
    used = {"sign_flip/scale2", "sign_flip/weights", "gaussian/replace", "ipm/eps"}
    used |= {"gaussian/fitted", "lie/z1", "lie/minus_ddof1", "lie/zmax", *FLIPS}
    assert found == used


@pytest.mark.parametrize(
    "case",
    [case for case in VALIDATION if case["algorithm"] == "lie"],
    ids=lambda case: f"n={case['args']['n']},m={case['args']['m']}",
)
def test_validation(case):
    n, m = case["args"]["n"], case["args"]["m"]
    if case["ok"]:
        attacks.alie().validate(n, m)
    else:
        with pytest.raises(ValueError, match=r"num_byzantine <= cohort_size // 2.*got"):
            attacks.alie().validate(n, m)
        attacks.alie(z=1.5).validate(n, m)
