"""The rules under test: one table, from which every test of this folder draws."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from fedjax_sim import aggregators as rules
from fedjax_sim.aggregators.common import standard_normal
from fedjax_sim.aggregators.dnc import draw_columns
from fedjax_sim.aggregators.pre_aggregators import random_order
from fedjax_sim.aggregators.signguard import draw_start
from fedjax_sim.pytrees import ravel
from fedjax_sim.types import Aggregator, PyTree, RoundContext
from tests.references import aggregators as oracle
from tests.references import averages, detection, filters, preaggregators, subsets
from tests.references import mad as trust


class Case(NamedTuple):
    """A rule and its reference for an assumed f: ``reference(f, U, mask, g0, sizes)``.

    The other fields say which promises hold. ``linear``: what the info's weights
    combine into the aggregate: the updates (``raw``), the updates at the root update's
    norm (``rescaled``), or nothing (None). ``translation``, ``scale``, ``permutation``:
    what is done to the updates is done to the aggregate. ``identical``, ``zero``: equal
    updates give that update, zero updates zero. ``robust``: F arbitrary rows do not
    move it far: they lose all weight, or, with ``bound``, the aggregate is not longer
    than that many times the longest honest update. ``root``: it needs the root update,
    as every rule with ``trust`` does. ``scored``: it needs the root dataset's scores.
    ``pretrained``: it learns before the first round. ``inexact``: scenarios of
    test_references.py in which float32 and float64 decide differently, for a reason
    given at the case.
    """

    make: Callable[[int], Aggregator]
    reference: Callable[..., oracle.Result]
    linear: str | None = None
    translation: bool = False
    coordinate_wise: bool = False
    trust: bool = False
    robust: bool = True
    scale: bool = True
    permutation: bool = True
    identical: bool = True
    zero: bool = True
    stateful: bool = False
    bound: float | None = None
    root: bool = False
    scored: bool = False
    pretrained: bool = False
    inexact: tuple[str, ...] = ()


def _krum(**options: object) -> Case:
    return Case(
        lambda f: rules.krum(f, **options),
        lambda f, U, mask, g0, sizes: oracle.krum(U, f, mask, **options),
        linear="raw",
        translation=True,
    )


def _multi_krum(m: Callable[[int], int] | None = None, **options: object) -> Case:
    def count(n: int) -> int | None:
        return None if m is None else m(n)

    weighted = options.get("weighted", False)
    rule = options.get("rule", "one_shot")
    return Case(
        lambda f: rules.multi_krum(f, count(f), **options),
        lambda f, U, mask, g0, sizes: oracle.multi_krum(
            U, f, count(f), mask, sizes if weighted else None, rule
        ),
        linear="raw",
        translation=True,
    )


def _dual(variant: str, m: int | None = None, **options: object) -> Case:
    return Case(
        lambda f: rules.dual_system(f, variant, num_selected=m, **options),
        lambda f, U, mask, g0, sizes: oracle.dual_system(
            U, g0, f, variant, mask, m, **options
        ),
        linear="raw" if variant == "gated_mean" else "rescaled",
        trust=True,
    )


def _chain(
    pres: Callable[[int], list], steps: Callable[[int], list], rule: str, **promises
) -> Case:
    """``rules.chain`` of the steps, then the rule of another case."""

    def reference(f, U, mask, g0, sizes):
        def inner(rows, mask, sizes):
            return CASES[rule].reference(f, rows, mask, g0, sizes)

        return preaggregators.chain(U, mask, sizes, steps(f), inner)

    return Case(
        lambda f: rules.chain(*pres(f), CASES[rule].make(f)), reference, **promises
    )


def _nnm(f: int) -> Callable:
    return lambda U, rows: preaggregators.nnm(U, rows, f)


def _bucketing(step: int, size: int = 2) -> tuple:
    """The oracle of ``bucketing`` as that step of a chain, with the chain's draws."""

    def buckets(U, rows):
        order = np.asarray(random_order(jax.random.fold_in(KEY, step), IDS))
        return preaggregators.bucketing(U, rows, list(order), size)

    return buckets, "groups"


def _foolsgold(**options: object) -> Case:
    by = options.get("combine", "normalized")
    return Case(
        lambda f: rules.foolsgold(**options),
        lambda f, U, mask, g0, sizes: filters.foolsgold(U, mask, combine_by=by),
        linear="raw" if by == "normalized" else None,
        robust=False,  # lengths are not looked at
        identical=False,  # clients that are all alike are all sybils
        stateful=True,
    )


def _auror(**options: object) -> Case:
    return Case(
        lambda f: rules.auror(**options),
        lambda f, U, mask, g0, sizes: filters.auror(U, mask, **options),
        linear="raw",
        translation=True,
        scale=False,  # the threshold is a length
        robust=False,  # two groups: one of two opposite outliers stays
        stateful=True,
    )


def _mad(**options: object) -> Case:
    """The first round, with exclusion from the first."""
    by_data = options.get("weighting") == "data"

    def reference(f, U, mask, g0, sizes):
        round_one = trust.MAD(start=1, **options)
        return round_one(U, range(len(U)), mask, sizes if by_data else None)

    return Case(
        lambda f: rules.mad(start=1, **options),
        reference,
        linear="raw",
        translation=True,
        # Of outliers equally far away: a farther one would hide the others.
        robust=True,
        stateful=True,
    )


def _dnc(passes: int, size: int) -> Case:
    def columns(d: int) -> list[np.ndarray]:
        if size >= d:
            return [np.arange(d)] * passes
        keys = [jax.random.fold_in(KEY, i) for i in range(passes)]
        return [np.asarray(draw_columns(k, d, size)) for k in keys]

    return Case(
        lambda f: rules.dnc(f, passes, size),
        lambda f, U, mask, g0, sizes: filters.dnc(U, f, columns(len(U[0])), mask=mask),
        linear="raw",
        translation=True,
    )


def _signguard(**options: object) -> Case:
    def reference(f, U, mask, g0, sizes):
        d = len(U[0])
        start = int(draw_start(KEY, d - int(options["fraction"] * d)))
        last = 0.1 * np.asarray(params_like(np.zeros(d, np.float32)))
        return filters.signguard(U, start, mask, last=last, **options)

    return Case(
        lambda f: rules.signguard(**options),
        reference,
        scale=options.get("similarity") != "distance",  # the last aggregate stays
        zero=False,  # a median length of 0 keeps nobody
    )


def _flame(**options: object) -> Case:
    def reference(f, U, mask, g0, sizes):
        d = len(U[0])
        w = np.asarray(params_like(np.zeros(d, np.float32)))
        return filters.flame(U, w, np.asarray(standard_normal(KEY, d)), mask, **options)

    return Case(
        lambda f: rules.flame(**options),
        reference,
        scale=options.get("space") == "update",
        identical=options.get("noise") == 0.0,
        bound=1.1,
    )


def _pdrr(base: str, **promises) -> Case:
    return Case(
        lambda f: rules.pdrr(f, base),
        lambda f, U, mask, g0, sizes: detection.pdrr(U, f, base, mask=mask),
        **promises,
    )


def _rejection(name: str, base: str, criteria: tuple[str, ...], **promises) -> Case:
    def reference(f, U, mask, g0, sizes):
        w = np.asarray(params_like(g0), np.float64)

        def judge(update):
            return root_scores(w + update, np)

        return detection.rejection(U, f, judge, criteria, base, mask, sizes)

    return Case(
        lambda f: getattr(rules, name)(f, base),
        reference,
        # What the server's samples say depends on where the model stands.
        translation=False,
        scale=False,
        scored=True,
        **promises,
    )


def _detector(
    factory: Callable[..., Aggregator],
    base: str,
    judge: Callable[..., tuple[dict, Callable]],
    space: str = "weights",
    options: dict[str, object] | None = None,
    **promises,
) -> Case:
    """``judge(state, x, U, mask, f)``: scores by client and who is flagged by them.

    The reference looks at the clients through what the compiled case has learned.
    """
    small = {"hidden": 8, "num_snapshots": 12, "num_steps": 20, "num_coordinates": 15}
    made = functools.cache(
        lambda f: factory(f, base, space=space, **small, **(options or {}))
    )

    def reference(f, U, mask, g0, sizes):
        name = next(name for name, case in CASES.items() if case.make is made)
        state, rows = compiled(name).state, oracle.present(U, mask)
        params = np.asarray(params_like(g0)) if space == "weights" else None
        x = detection.seen(U, rows, state.view, params)
        scores, flags = judge(state, x, U, mask, f)
        return detection.without_flagged(U, f, base, mask, sizes, scores, flags)

    return Case(
        made,
        reference,
        # Models are known by where they are.
        translation=False,
        scale=False,
        pretrained=True,
        **promises,
    )


def layers(net: PyTree) -> dict:
    """Kernel and bias of every layer, those of one name and a number in a list."""
    found: dict = {}
    for name in sorted(net):
        layer = (np.asarray(net[name]["kernel"]), np.asarray(net[name]["bias"]))
        if name[-2:] in ("_0", "_1"):
            found.setdefault(name[:-2], []).append(layer)
        else:
            found[name] = layer
    return found


def capped(scores: dict, n: int) -> dict:
    """Where float32 ends they are as high as n of them can be summed."""
    cap = np.finfo(np.float32).max / (4 * n)
    return {i: score if score < cap else cap for i, score in scores.items()}


def _by_vae(reject: str, draws: int = 0) -> Callable:
    def judge(state, x, U, mask, f):
        net, scores = layers(state.net), dict.fromkeys(x, 0.0)
        shape = (len(U), len(net["to_mean"][1]))
        noise: list = [np.zeros(shape)]
        if draws:
            keys = jax.random.split(KEY, draws)
            noise = [np.asarray(jax.random.normal(key, shape)) for key in keys]
        with np.errstate(over="ignore", invalid="ignore"):
            for xi in noise:
                for i in x:
                    seen = detection.vae_forward(net, x[i], xi[i])
                    scores[i] += detection.vae_score(x[i], *seen) / len(noise)
        scores = capped(scores, len(U))
        by = {"mean": detection.above_mean, "count": detection.highest}
        return scores, by[reject](scores)

    return judge


def _by_pca(state, x, U, mask, f):
    scores = {i: detection.pca_residual(x[i], state.net) for i in x}
    return scores, detection.above_mean(scores)


def _by_dagmm(reject: str) -> Callable:
    def judge(state, x, U, mask, f):
        net, K = layers(state.net), len(state.mixture.mean)
        # The mixture as densities need it: covariances, and not their factors.
        factors = np.linalg.inv(np.asarray(state.mixture.whiten, np.float64))
        mixture = (
            np.exp(np.asarray(state.mixture.log_weight, np.float64)),
            np.asarray(state.mixture.mean, np.float64),
            [factors[k] @ factors[k].T for k in range(K)],
        )
        scores = {
            i: detection.energy(detection.dagmm_forward(net, x[i])[0], *mixture)
            for i in x
        }
        scores = capped(scores, len(U))
        if reject == "count":
            return scores, detection.highest(scores)
        _, r, f = oracle.counts(U, mask, f)
        threshold = np.quantile(
            np.asarray(state.energies, np.float64), 1 - f / max(r, 1)
        )
        return scores, detection.above(scores, threshold)

    return judge


CASES: dict[str, Case] = {
    "fedavg": Case(
        lambda f: rules.fedavg(),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask, sizes),
        linear="raw",
        translation=True,
        robust=False,
    ),
    "fedavg-uniform": Case(
        lambda f: rules.fedavg(weighting="uniform"),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask),
        linear="raw",
        translation=True,
        robust=False,
    ),
    "fedavg-total": Case(
        lambda f: rules.fedavg(denominator="total"),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask, sizes, NUM_CLIENTS),
        robust=False,
    ),
    "median": Case(
        lambda f: rules.median(),
        lambda f, U, mask, g0, sizes: oracle.median(U, mask),
        translation=True,
        coordinate_wise=True,
    ),
    "median-lower": Case(
        lambda f: rules.median(even="lower"),
        lambda f, U, mask, g0, sizes: oracle.median(U, mask, "lower"),
        translation=True,
        coordinate_wise=True,
    ),
    "trimmed_mean": Case(
        rules.trimmed_mean,
        lambda f, U, mask, g0, sizes: oracle.trimmed_mean(U, f, mask),
        translation=True,
        coordinate_wise=True,
    ),
    "krum": _krum(),
    "krum-unsquared": _krum(squared=False),
    "krum-n-f-1": _krum(neighbours="n-f-1"),
    "krum-n-f": _krum(neighbours="n-f", squared=False),
    "multi_krum": _multi_krum(),
    "multi_krum-m": _multi_krum(lambda f: f + 4),
    "multi_krum-weighted": _multi_krum(weighted=True),
    "multi_krum-iterative": _multi_krum(rule="iterative"),
    "fltrust": Case(
        lambda f: rules.fltrust(),
        lambda f, U, mask, g0, sizes: oracle.fltrust(U, g0, mask),
        linear="rescaled",
        trust=True,
    ),
    "dual_system": _dual("filter_then_trust"),
    "dual_system-raw": _dual("filter_then_trust", krum_space="raw"),
    "dual_system-m": _dual("filter_then_trust", m=4),
    "dual_system-root": _dual("intersection", tau=0.9, fallback="root"),
    "dual_system-trust_then_filter": _dual("trust_then_filter"),
    "dual_system-trust_then_filter-tau": _dual("trust_then_filter", tau=0.3, m=3),
    "dual_system-soft": _dual("soft"),
    "dual_system-soft-raw": _dual("soft", m=3, gamma=2.5, krum_space="raw"),
    "dual_system-intersection": _dual("intersection", tau=0.3),
    "dual_system-dynamic_trust": _dual("dynamic_trust", rho=0.2, k=0.1)._replace(
        stateful=True
    ),
    "dual_system-dynamic_trust-first": _dual(
        "dynamic_trust", base="trust_then_filter", rho=0.0, k=0.3, tau_max=0.9
    ),
    "dual_system-gated_mean": _dual("gated_mean"),
    "dual_system-gated_mean-m": _dual("gated_mean", m=4),
    "mda": Case(
        rules.mda,
        lambda f, U, mask, g0, sizes: subsets.mda(U, f, mask),
        linear="raw",
        translation=True,
    ),
    "caf": Case(
        rules.caf,
        lambda f, U, mask, g0, sizes: subsets.caf(U, f, mask),
        linear="raw",
        translation=True,
    ),
    "smea": Case(
        rules.smea,
        lambda f, U, mask, g0, sizes: subsets.smea(U, f, mask),
        linear="raw",
        translation=True,
    ),
    "monna": Case(
        rules.monna,
        lambda f, U, mask, g0, sizes: subsets.monna(U, f, g0, mask),
        linear="raw",
        root=True,
    ),
    "monna-pivot": Case(
        lambda f: rules.monna(f, pivot=int(IDS[3])),
        lambda f, U, mask, g0, sizes: subsets.monna(U, f, 3, mask),
        linear="raw",
        translation=True,
        permutation=False,  # another row is the pivot's then
    ),
    "chain-nnm-krum": _chain(
        lambda f: [rules.nnm(f)],
        lambda f: [_nnm(f)],
        "krum",
        linear="raw",
        translation=True,
    ),
    "chain-nnm-trimmed_mean": _chain(
        lambda f: [rules.nnm(f)],
        lambda f: [_nnm(f)],
        "trimmed_mean",
        translation=True,
        # Means of whole numbers that tie in float64 are rounded apart in float32.
        inexact=("ties",),
    ),
    "chain-bucketing-median": _chain(
        lambda f: [rules.bucketing()],
        lambda f: [_bucketing(0)],
        "median",
        translation=True,
        permutation=False,  # other clients share a bucket then
    ),
    "chain-clipping-fedavg": _chain(
        lambda f: [rules.clipping()],
        lambda f: [preaggregators.clipping],
        "fedavg",
        bound=1 + 1e-5,
    ),
    "chain-arc-krum": _chain(
        lambda f: [rules.arc(f)],
        lambda f: [lambda U, rows: preaggregators.arc(U, rows, f)],
        "krum",
        bound=1 + 1e-5,
    ),
    "chain-nnm-bucketing-clipping-fltrust": _chain(
        lambda f: [rules.nnm(f), rules.bucketing(3), rules.clipping(2.0)],
        lambda f: [
            _nnm(f),
            _bucketing(1, 3),
            lambda U, rows: preaggregators.clipping(U, rows, 2.0),
        ],
        "fltrust",
        trust=True,
        permutation=False,
        bound=1.0,
        # Who is nearest to an outlier: float32 finds all others equally far away.
        inexact=("1e8", "1e18"),
    ),
    "meamed": Case(
        rules.meamed,
        lambda f, U, mask, g0, sizes: averages.meamed(U, f, mask),
        translation=True,
        bound=1.0,
    ),
    "phocas": Case(
        rules.phocas,
        lambda f, U, mask, g0, sizes: averages.phocas(U, f, mask),
        translation=True,
        bound=1.0,
    ),
    "bulyan": Case(
        rules.bulyan,
        lambda f, U, mask, g0, sizes: averages.bulyan(U, f, mask),
        translation=True,
        permutation=False,  # nearest neighbours of each other tie in the last passes
    ),
    "geometric_median": Case(
        lambda f: rules.geometric_median(),
        lambda f, U, mask, g0, sizes: averages.geometric_median(U, sizes, mask),
        linear="raw",
        translation=True,
        robust=False,  # three steps do not get over an outlier
    ),
    "geometric_median-converged": Case(
        lambda f: rules.geometric_median(num_steps=30, weighting="uniform"),
        lambda f, U, mask, g0, sizes: averages.geometric_median(
            U, np.ones(len(U)), mask, T=30
        ),
        linear="raw",
        translation=True,
        bound=1.0,
    ),
    "geometric_median-zero": Case(
        lambda f: rules.geometric_median(num_steps=2, floor=4.0, start="zero"),
        lambda f, U, mask, g0, sizes: averages.geometric_median(
            U, sizes, mask, T=2, nu=4.0, z0="zero"
        ),
        linear="raw",
        scale=False,
        bound=1.0,
    ),
    "centered_clipping": Case(
        lambda f: rules.centered_clipping(),
        lambda f, U, mask, g0, sizes: averages.centered_clipping(U, "median", mask),
        stateful=True,
        bound=1.0,
    ),
    "centered_clipping-radius": Case(
        lambda f: rules.centered_clipping(radius=2.0, num_steps=3),
        lambda f, U, mask, g0, sizes: averages.centered_clipping(U, 2.0, mask, L=3),
        stateful=True,
        scale=False,
        identical=False,
        bound=1.0,
    ),
    "norm_clipping": Case(
        lambda f: rules.norm_clipping(),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(U, 3.0, mask),
        scale=False,
        identical=False,
        bound=1.0,
    ),
    "norm_clipping-median": Case(
        lambda f: rules.norm_clipping(bound="median"),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(U, "median", mask),
        bound=1.0,
    ),
    "norm_clipping-reject": Case(
        lambda f: rules.norm_clipping(bound=7.0, mode="reject"),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(U, 7.0, mask, "reject"),
        linear="raw",
        scale=False,
    ),
    "norm_clipping-noise": Case(
        lambda f: rules.norm_clipping(noise_std=0.5),
        lambda f, U, mask, g0, sizes: averages.norm_clipping(
            U, 3.0, mask, sigma=0.5, noise=server_noise(U)
        ),
        scale=False,
        identical=False,
        zero=False,
        bound=1.0,
    ),
    "robust_learning_rate": Case(
        lambda f: rules.robust_learning_rate(f + 2),
        lambda f, U, mask, g0, sizes: averages.robust_learning_rate(
            U, f + 2, sizes, mask
        ),
        robust=False,
    ),
    "robust_learning_rate-median": Case(
        lambda f: rules.robust_learning_rate(f + 2, base="median"),
        lambda f, U, mask, g0, sizes: averages.robust_learning_rate(
            U, f + 2, sizes, mask, "median"
        ),
        bound=1.0,
    ),
    "crfl": Case(
        lambda f: rules.crfl(),
        lambda f, U, mask, g0, sizes: averages.crfl(
            U, params_like(g0), 2.4, 0.01, server_noise(U), mask
        ),
        scale=False,
        identical=False,
        zero=False,
        bound=1.0,
    ),
    "crfl-quiet": Case(
        lambda f: rules.crfl(0.1, slope=0.05, noise_std=0.0, weighting="data"),
        lambda f, U, mask, g0, sizes: averages.crfl(
            U, params_like(g0), 0.3, 0.0, server_noise(U), mask, sizes
        ),
        scale=False,
        identical=False,
        zero=False,
        bound=1.0,
    ),
    "foolsgold": _foolsgold(),
    "foolsgold-sum": _foolsgold(combine="sum"),
    "foolsgold-mean": _foolsgold(combine="mean"),
    "auror": _auror(threshold=2.0),
    "auror-vote": _auror(threshold=2.0, mode="vote", share=0.4),
    # Options by which they differ here from rules that keep the same clients.
    "mad": _mad(threshold=0.7, weighting="data"),
    "mad-max": _mad(scale="max", threshold=0.6),
    "mad-clusters": _mad(clusters=2, weighting="data"),
    "dnc": _dnc(3, 15),
    "dnc-all": _dnc(1, 10_000),
    "signguard": _signguard(fraction=0.7),
    "signguard-two_means": _signguard(fraction=0.7, cluster="two_means"),
    "signguard-cosine": _signguard(fraction=1.0, similarity="cosine"),
    "signguard-distance": _signguard(fraction=1.0, similarity="distance"),
    "flame": _flame(noise=0.01),
    "flame-update": _flame(noise=0.0, space="update"),
    # In the first round there is nothing to predict from: the mean of all.
    "fldetector": Case(
        lambda f: rules.fldetector(window=3, start=0),
        lambda f, U, mask, g0, sizes: oracle.fedavg(U, mask),
        linear="raw",
        translation=True,
        robust=False,
        stateful=True,
    ),
    "pdrr": _pdrr(
        "krum",
        linear="raw",
        # Two honest rows are flagged and with f' = 0 an outlier is in every score, of
        # which float32 holds no other part.
        inexact=("1e8", "1e18"),
    ),
    # Of outliers in every coordinate; of zeros nothing is moved: everybody is flagged.
    "pdrr-trimmed_mean": _pdrr("trimmed_mean", zero=False),
    "pdrr-median": _pdrr("median", zero=False),
    "err": _rejection(
        "err",
        "fedavg",
        ("error",),
        linear="raw",
        robust=False,  # without one of two outliers the other is still there
        permutation=False,  # equal error rates are frequent
    ),
    "lfr": _rejection("lfr", "median", ("loss",)),
    "lfr-trimmed_mean": _rejection(
        "lfr",
        "trimmed_mean",
        ("loss",),
        robust=False,  # two honest clients go, and with f' = 0 nothing is trimmed
    ),
    "err_lfr": _rejection(
        "err_lfr",
        "krum",
        ("error", "loss"),
        linear="raw",
        permutation=False,
        inexact=("1e8", "1e18"),  # as pdrr
    ),
    "vae_detector": _detector(
        rules.vae_detector, "fedavg", _by_vae("mean"), linear="raw"
    ),
    "vae_detector-count": _detector(
        rules.vae_detector,
        "trimmed_mean",
        _by_vae("count", draws=3),
        "update",
        {"reject": "count", "latent": 3, "draws": 3},
        permutation=False,  # every row has its draws
    ),
    "vae_detector-pca": _detector(
        rules.vae_detector,
        "krum",
        _by_pca,
        options={"learner": "pca", "latent": 4},
        linear="raw",
    ),
    "dagmm_detector": _detector(
        rules.dagmm_detector,
        "fedavg",
        _by_dagmm("count"),
        linear="raw",
        robust=False,  # code, relative distance and cosine of the farthest are bounded
        inexact=("1e18",),  # coordinates are cut at 1e15, which turns the vector
    ),
    "dagmm_detector-quantile": _detector(
        rules.dagmm_detector,
        "median",
        _by_dagmm("quantile"),
        "update",
        {"reject": "quantile"},
        identical=False,  # all of them may be less likely than in pre-training
        zero=False,
        inexact=("1e18",),
    ),
}

# Enough for what every rule promises: the others differ from these in a number.
DISTINCT = [
    name
    for name in CASES
    if name
    not in (
        "fedavg-uniform",
        "krum-n-f-1",
        "krum-n-f",
        "multi_krum-m",
        "dual_system-m",
        "dual_system-trust_then_filter-tau",
        "dual_system-soft-raw",
        "dual_system-intersection",
        "dual_system-dynamic_trust-first",
        "dual_system-gated_mean-m",
        "phocas",
        "geometric_median-zero",
        "centered_clipping-radius",
        "norm_clipping-median",
        "crfl-quiet",
        "chain-nnm-trimmed_mean",
        "foolsgold-sum",
        "foolsgold-mean",
        "mad-max",
        "dnc-all",
        "signguard-distance",
        "lfr-trimmed_mean",
        "vae_detector-pca",
        "dagmm_detector-quantile",
    )
]

# N, the clients in all; a cohort of N rows is smaller.
NUM_CLIENTS = 40
N, D, F = 12, 23, 2
KEY = jax.random.key(5)
# Who the rows are, of the NUM_CLIENTS: not in order.
IDS = np.random.default_rng(9).permutation(NUM_CLIENTS)[:N].astype(np.int32)


def context(g0, mask=None, sizes=None, **fields) -> RoundContext:
    """A context with everything that some rule needs.

    The server's parameters are ``params_like(g0)``, the same in every round; the cohort
    is the clients ``IDS``.
    """
    params = params_like(g0)
    everything = {
        "root_update": g0,
        "num_samples": None if sizes is None else jnp.asarray(sizes, jnp.float32),
        "mask": None if mask is None else jnp.asarray(mask),
        "key": KEY,
        "params": params,
        "previous_params": jax.tree.map(lambda w: 0.9 * w, params),
        "previous_aggregate": jax.tree.map(lambda w: 0.1 * w, params),
        "root_scores": jax.tree_util.Partial(scores_of),
        "round": jnp.int32(3),
        "client_ids": jnp.asarray(IDS),
    }
    return RoundContext(**everything | fields)


def params_like(tree):
    """Parameters in the structure of ``tree``, the same in every call and round."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([np.size(x) for x in leaves])
    flat = 0.5 * np.cos(1.0 + 0.7 * np.arange(ends[-1]))
    parts = np.split(flat, ends[:-1])
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(p.reshape(np.shape(x)), jnp.result_type(x))
            for p, x in zip(parts, leaves)
        ],
    )


def root_scores(w, np) -> tuple:
    """A loss and an error rate of 46 steps, in ``jax.numpy`` or NumPy.

    Both are lowest near a model a little way off; the loss grows slowly, so that what
    outliers do to it has float32 digits.
    """
    size = len(w)
    wanted = 2 * np.cos(1.0 + 0.7 * np.arange(size)) + np.sin(0.3 * np.arange(size))
    loss = np.log1p(np.square(w - wanted)).mean()
    wrong = np.concatenate([w * wanted < 0, np.abs(w - wanted) > 2.5])
    return loss, np.where(wrong, 1.0, 0.0).mean()


def scores_of(params) -> tuple:
    return root_scores(ravel(params), jnp)


def train(key, params):
    """A server's local training, in the structure of the parameters."""
    w, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(key, w.shape) - 0.5 * w)


def start(rule: Aggregator, params: PyTree) -> PyTree:
    """The rule's state before the first round, learned where it has to be."""
    if rule.pretrain is None:
        return rule.init(params, NUM_CLIENTS)
    return jax.jit(lambda params, key: rule.pretrain(params, key, train))(params, KEY)


def server_noise(U) -> np.ndarray:
    """What a server that adds noise draws in the tests: from the key as it is."""
    return np.asarray(jax.random.normal(KEY, (np.shape(U)[1],), jnp.float32))


def cohort(seed: int, n: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``U [n, d]``, root update ``[d]`` and sizes ``[n]`` on which the rules differ."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d)
    # Skewed in every coordinate, so that mean, median and trimmed mean fall apart; of
    # mixed length and direction, so that the filters and the trust scores do.
    noise = rng.exponential(size=(n, d)) * rng.normal(size=(n, 1))
    U = rng.lognormal(sigma=0.5, size=(n, 1)) * (0.5 * direction + noise)
    U[1::5] -= 1.2 * direction
    g0 = 0.7 * direction + 0.3 * rng.normal(size=d)
    sizes = rng.integers(1, 50, size=n)
    return U.astype(np.float32), g0.astype(np.float32), sizes.astype(np.float32)


def attacked(U: np.ndarray, f: int, kind: str) -> np.ndarray:
    """The same rows, the last f of them replaced."""
    U = U.copy()
    n, d = U.shape
    wave = np.cos(np.arange(d)).astype(np.float32)
    for i in range(n - f, n):
        sign = 1 if i % 2 else -1
        U[i] = {
            "collude": U[: n - f].mean(axis=0) + 3 * wave,
            "1e8": sign * 1e8 * wave,
            "1e18": sign * 1e18 * wave / np.sqrt(d),
            "inf": np.full(d, sign * np.inf),
            "nan": np.where(np.arange(d) % 2, np.nan, 1.0),
            "overflow": np.full(d, sign * 1e30),
            "zero": np.zeros(d),
        }[kind]
    return U


class Compiled:
    """A rule for f = F, jitted once for all tests; it counts its traces."""

    def __init__(self, name: str):
        self.rule = CASES[name].make(F)
        self.state = start(self.rule, jnp.zeros(D))
        self.traces = 0

        @jax.jit
        def apply(U, g0, mask, sizes, byzantine):
            self.traces += 1
            this = context(g0, mask, sizes, byzantine=byzantine)
            return self.rule.apply(U, self.state, this)

        self.apply = apply

    def __call__(self, U, g0, mask=None, sizes=None, byzantine=None):
        """The aggregate and the info, of arrays of one shape and type."""
        result = self.apply(
            np.asarray(U, np.float32),
            np.asarray(g0, np.float32),
            np.ones(N, bool) if mask is None else mask,
            np.ones(N, np.float32) if sizes is None else sizes,
            np.zeros(N, bool) if byzantine is None else byzantine,
        )
        assert self.traces == 1
        return np.asarray(result[0]), result[2]


compiled = functools.cache(Compiled)

KINDS = ("collude", "1e8", "1e18", "inf", "nan", "overflow", "zero")
