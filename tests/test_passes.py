"""Rules in passes over rows: the same as on the whole matrix, however it is cut."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_sim as fs
from fedjax_sim import passes, streaming
from fedjax_sim.types import RoundContext
from tests.aggregators.cases import CASES
from tests.trees import assert_close

a = fs.aggregators
RULES = {
    "fedavg": a.fedavg(),
    "fedavg total": a.fedavg(denominator="total"),
    "norm_clipping": a.norm_clipping(bound=4.0),
    "norm_clipping median": a.norm_clipping(bound="median"),
    "norm_clipping reject": a.norm_clipping(bound=6.0, mode="reject"),
    "norm_clipping noise": a.norm_clipping(bound=4.0, noise_std=0.1),
    "centered_clipping": a.centered_clipping(num_steps=3),
    "centered_clipping radius": a.centered_clipping(radius=2.0),
    "fltrust": a.fltrust(),
    "crfl": a.crfl(noise_std=0.01),
    "robust_learning_rate": a.robust_learning_rate(threshold=3),
    "robust_learning_rate median": a.robust_learning_rate(threshold=3, base="median"),
    "geometric_median": a.geometric_median(),
    "geometric_median zero": a.geometric_median(num_steps=1, start="zero"),
    "krum": a.krum(max_byzantine=3),
    "krum distances": a.krum(max_byzantine=3, squared=False),
    "multi_krum": a.multi_krum(max_byzantine=3, weighted=True),
    "multi_krum iterative": a.multi_krum(max_byzantine=3, rule="iterative"),
    **{
        f"dual_system {variant}": a.dual_system(max_byzantine=3, variant=variant)
        for variant in (
            "filter_then_trust",
            "trust_then_filter",
            "soft",
            "dynamic_trust",
            "gated_mean",
        )
    },
    "dual_system root": a.dual_system(max_byzantine=9, fallback="root"),
    "median": a.median(),
    "median lower": a.median(even="lower"),
    "trimmed_mean": a.trimmed_mean(max_byzantine=3),
    "meamed": a.meamed(max_byzantine=3),
    "phocas": a.phocas(max_byzantine=3),
}
N, D = 23, 37


def cohort(seed, masked=True):
    """Rows of every kind: ties, attackers, a NaN, an infinity, some masked out."""
    rng = np.random.default_rng(seed)
    U = rng.normal(0.4, 1.0, (N, D)).astype(np.float32)
    U[:, 5] = np.round(U[:, 5])  # many equal values
    U[:, 6] = 0.0
    U[:, 7] = np.where(rng.random(N) < 0.5, 0.0, -0.0)
    U[2], U[11] = 40.0, -300.0
    U[3] = U[4]
    context = RoundContext(
        key=jax.random.key(seed),
        params=jnp.asarray(rng.normal(size=D), jnp.float32),
        round=jnp.int32(3),
        num_samples=jnp.asarray(rng.integers(1, 50, N), jnp.float32),
        client_ids=jnp.arange(N),
        root_update=jnp.asarray(rng.normal(0.4, 1.0, D), jnp.float32),
    )
    if masked:
        U[7, 3], U[20, 0], U[22] = np.nan, np.inf, 1e30
        context = context._replace(mask=jnp.arange(N) % 9 != 8)
    return jnp.asarray(U), context


def rows_of(U, mask, chunk, memory):
    """Rows with their place as their extras."""

    def make(places):
        return U[places], places.astype(jnp.float32)

    return passes.Rows(make, *U.shape, chunk=chunk, memory=memory, mask=mask)


# Everything held; some columns at a time; two numbers at a time, so that ranks are
# found by their digits.
CUTS = {"held": (4, 10**6), "blocks": (7, 4 * 24 * 5), "digits": (1, 2 * 4 * 24)}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", RULES)
def test_in_passes_is_the_rule(name, cut):
    rule, (U, context) = RULES[name], cohort(1, masked=cut != "held")
    state = rule.init(U[0], N)
    wanted = rule.apply(U, state, context)

    @jax.jit
    def run(U):
        rows = rows_of(U, context.mask, *CUTS[cut])
        return *rule.in_passes(rows, state, context), rows.present, rows.extras

    *found, present, extras = run(U)
    assert_close(found, list(wanted), rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(found[2].flagged, wanted[2].flagged)
    np.testing.assert_array_equal(extras, np.arange(N))
    taking = np.ones(N, bool) if context.mask is None else np.asarray(context.mask)
    finite = np.isfinite(np.square(np.asarray(U, np.float64)).sum(axis=1))
    finite &= np.abs(np.asarray(U)).max(axis=1) < 1e19
    np.testing.assert_array_equal(present, taking & finite)


ATTACKS = {
    "alie": fs.attacks.alie(z=1.5),
    "alie z_max": fs.attacks.alie(),
    "alie omniscient": fs.attacks.alie(knowledge="omniscient", ddof=1),
    "ipm": fs.attacks.ipm(epsilon=2.0),
    "ipm colluding": fs.attacks.ipm(knowledge="colluding"),
    "gaussian": fs.attacks.gaussian(std=2.0),
    "gaussian fitted": fs.attacks.gaussian(mode="fitted"),
    "additive_noise": fs.attacks.additive_noise(),
    "sign_flip": fs.attacks.sign_flip(),
    "scaling": fs.attacks.scaling(factor=3.0),
    "same_value": fs.attacks.same_value(),
    "free_rider": fs.attacks.free_rider(mode="noisy"),
    "model_replacement": fs.attacks.model_replacement(),
    "model_replacement bound": fs.attacks.model_replacement(norm_bound=3.0),
    "nan_rows": fs.attacks.nan_rows(),
    "schedule": fs.attacks.schedule(fs.attacks.alie(z=1.5), start=3),
    "schedule off": fs.attacks.schedule(fs.attacks.alie(z=1.5), start=4),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("cut", ["held", "digits"])
def test_attacks_in_passes(name, cut):
    attack, (U, context) = ATTACKS[name], cohort(2)
    context = context._replace(byzantine=jnp.arange(N) % 4 == 1)
    state = attack.init(U[0], N)
    wanted, _ = attack.apply(U, state, context)
    assert (name == "schedule off") == np.array_equal(wanted, U, equal_nan=True)

    @jax.jit
    def run(U):
        rows = rows_of(U, context.mask, *CUTS[cut])
        in_passes = attack.in_passes or streaming.alone(attack)
        sent = rows.then(in_passes(rows, state, context))
        return sent.scan(lambda updates, present: ((), updates))[1], sent.finite

    found, finite = run(U)
    # Rows that take no part come back as zeros.
    with np.errstate(over="ignore"):
        there = np.isfinite(np.square(np.asarray(wanted)).sum(axis=1))
    np.testing.assert_array_equal(finite, there)
    taking = (there & np.asarray(context.mask))[:, None]
    assert_close(found, np.where(taking, wanted, 0.0), rtol=2e-5, atol=1e-5)


def test_the_cuts_are_three_kinds():
    U, _ = cohort(0)
    blocks = {cut: rows_of(U, None, *how).num_blocks for cut, how in CUTS.items()}
    assert blocks["held"] == 1
    assert 1 < blocks["blocks"] <= 9 < blocks["digits"]


def test_every_rule_in_passes_is_tested_and_in_the_docs():
    having = {rule.name for rule in RULES.values()}
    assert all(rule.in_passes is not None for rule in RULES.values())
    by_default = [case.make(2) for case in CASES.values()]
    assert having == {rule.name for rule in by_default if rule.in_passes is not None}
    text = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    table = text[text.index("| rule | trained") :].split("\n\n")[0]
    first = "".join(line.split("|")[1] for line in table.splitlines()[2:])
    assert set(re.findall(r"`(\w+)`", first)) == having
