"""FLDetector: removes clients whose updates the past does not predict."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.common import normalize, weighted_sum
from fedjax_sim.clustering import split_in_two, sums_of_squares
from fedjax_sim.linalg import solve
from fedjax_sim.pytrees import participants, ravel, safe_norms
from fedjax_sim.registry import check_count, check_type, require
from fedjax_sim.types import Aggregator, AggregatorInfo, Array, PyTree, RoundContext


class FLDetectorState(NamedTuple):
    """What FLDetector remembers of N clients and W rounds.

    Attributes:
        expected: ``float32 [N, d]``, the update each client is to send next: its last
            one, carried along by the prediction of every round since.
        seen: ``bool [N]``, who has taken part before.
        errors: ``float32 [N, W]``, each client's latest errors, a ring.
        num_errors: ``int32 [N]``, errors recorded so far.
        steps: ``float32 [W, d]``, latest changes of the model, oldest first; the last
            ``num_pairs`` of them count.
        changes: ``float32 [W, d]``, the changes of the gradient that went with them.
        num_pairs: ``int32 []``, at most W.
        aggregate: ``float32 [d]``, the last aggregate.
        fresh: ``bool []``, whether ``aggregate`` is of the round before.
        rounds: ``int32 []``, rounds so far.
        rounds_judged: ``int32 []``, rounds so far in which errors were recorded.
        excluded: ``bool [N]``, who is out for good.
    """

    expected: Array
    seen: Array
    errors: Array
    num_errors: Array
    steps: Array
    changes: Array
    num_pairs: Array
    aggregate: Array
    fresh: Array
    rounds: Array
    rounds_judged: Array
    excluded: Array


def fldetector(
    window: int = 10,
    start: int = 50,
    max_clusters: int = 7,
    num_references: int = 10,
    permanent: bool = False,
) -> Aggregator:
    """The mean of the clients whose updates follow from their last ones.

    With pseudo-gradients ``g = -u``, the model ``w_t`` and the approximation ``B`` of
    the Hessian by the L-BFGS formula from the last ``window`` changes of model and
    aggregate::

        expected_i = g_i(t-1) + B (w_t - w_{t-1})
        e_i        = |expected_i - g_i(t)|,  divided by the mean of all e
        score_i    = mean of e_i over the last window rounds

    If the gap statistic finds more than one cluster in the scores, scaled to [0, 1],
    the upper one of their 2-means is left out of the mean.

    Assumptions: honest updates change from round to round as the model does, those of
    attackers do not; an attacker that keeps sending honest-looking changes passes. Not
    a bound on f, but the honest must be the cluster of lower mean.

    Cost: O((n + W^2) d) for a window W.

    Args:
        window: rounds that the scores are averaged over, and pairs in the formula. No
            client is left out before as many rounds have been judged.
        start: rounds before the first that is judged: 50 for MNIST and 20 for CIFAR-10
            in the authors' experiments.
        max_clusters: the most clusters the gap statistic looks for.
        num_references: sets of uniform scores it compares with.
        permanent: a client left out once stays out.

    Returns:
        An ``Aggregator`` that needs ``client_ids``, ``key``, ``params`` and
        ``previous_params``. Clients left out are flagged; scores are ``score_i``, 0
        without a record; details are ``error``, this round's ``e_i`` (0 if not judged),
        and ``clusters``, how many were found. Its state is a ``FLDetectorState``: N + 2
        window + 1 vectors as long as the model.

    Raises:
        ValueError: an option out of range; from ``apply``, a context field missing.

    Example:
        >>> rule = fldetector(window=2, start=0)
        >>> state = rule.init(jnp.zeros(3), num_clients=100)
        >>> state.expected.shape, state.errors.shape, state.steps.shape
        ((100, 3), (100, 2), (2, 3))

    References:
        Zhang, Cao, Jia, Gong, "FLDetector: defending federated learning against model
        poisoning attacks via detecting malicious clients", KDD 2022. Gap statistic:
        Tibshirani, Walther, Hastie, J. R. Stat. Soc. B 2001.

    Differs from the paper: it stops at the first detection and trains anew without the
    flagged; a rule of one round leaves them out of that round, and judges them again in
    the next, or with ``permanent`` never. Errors are divided by their mean, not their
    sum, so that in a sampled cohort rounds with few known clients count alike; with
    everybody present that is one factor. A client absent for rounds is compared with
    its last update plus the predictions of all rounds since; a new one is not judged.
    The gap is Tibshirani's (the mean of the logarithms; the authors' code takes the
    logarithm of the mean), and where no k satisfies its condition k is
    ``max_clusters``. Rounds are not judged where the last pair has no positive
    curvature or the formula no finite value; equal scores are one cluster; sums of
    squares are at least 1e-12.
    """
    window = check_count("fldetector's window", window, 1)
    start = check_count("fldetector's start", start, 0)
    max_clusters = check_count("fldetector's max_clusters", max_clusters, 2)
    num_references = check_count("fldetector's num_references", num_references, 1)
    check_type("fldetector's permanent", permanent, bool)

    def init(params: PyTree, num_clients: int) -> FLDetectorState:
        d = ravel(params).size
        zero = jnp.int32(0)
        return FLDetectorState(
            expected=jnp.zeros((num_clients, d)),
            seen=jnp.zeros(num_clients, bool),
            errors=jnp.zeros((num_clients, window)),
            num_errors=jnp.zeros(num_clients, jnp.int32),
            steps=jnp.zeros((window, d)),
            changes=jnp.zeros((window, d)),
            num_pairs=zero,
            aggregate=jnp.zeros(d),
            fresh=jnp.zeros((), bool),
            rounds=zero,
            rounds_judged=zero,
            excluded=jnp.zeros(num_clients, bool),
        )

    def validate(cohort_size: int) -> None:
        check_count("fldetector's cohort_size", cohort_size, 1)

    def apply(
        updates: PyTree, state: FLDetectorState, context: RoundContext
    ) -> tuple[PyTree, FLDetectorState, AggregatorInfo]:
        U, mask, unravel = participants(updates, context)
        validate(len(U))
        ids = require("fldetector", context, "client_ids")
        params = ravel(require("fldetector", context, "params"))
        step = params - ravel(require("fldetector", context, "previous_params"))

        # What each client was to send, and how far off it is.
        gradient_change, valid = hessian_vector_product(
            state.steps, state.changes, state.num_pairs, step
        )
        expected = state.expected - gradient_change[None]
        allowed = mask & ~state.excluded[ids]
        judged = allowed & state.seen[ids] & valid & (state.rounds >= start)
        error = prediction_errors(expected[ids], U, judged) * judged.sum()
        slot = state.num_errors[ids] % window
        errors = state.errors.at[ids, slot].set(
            jnp.where(judged, error, state.errors[ids, slot])
        )
        num_errors = state.num_errors.at[ids].add(judged)
        rounds_judged = state.rounds_judged + judged.any()
        on_record = jnp.clip(num_errors[ids], 1, window)
        scores = errors[ids].sum(axis=1) / on_record

        # Who is left out.
        known = allowed & (num_errors[ids] > 0)
        references = draw_references(
            require("fldetector", context, "key"), num_references, len(U)
        )
        scaled, spread = min_max(scores, known)
        clusters = number_of_clusters(scaled, references, known, max_clusters)[0]
        clusters = jnp.where(spread, clusters, 1)
        attack = (clusters > 1) & (rounds_judged >= window)
        malicious = split_in_two(scaled, known) & attack
        excluded = state.excluded
        if permanent:
            excluded = excluded.at[ids].set(excluded[ids] | malicious)
        keep = allowed & ~malicious
        weights = normalize(keep.astype(jnp.float32))
        aggregate = weighted_sum(weights, U)

        # The new pair, unless a round without an aggregate lies between.
        moved = safe_norms(step[None])[0]
        paired = state.fresh & keep.any() & jnp.isfinite(moved) & (moved > 1e-12)
        change = state.aggregate - aggregate  # of the gradient: minus the update

        def push(pairs: Array, newest: Array) -> Array:
            pushed = jnp.concatenate([pairs[1:], newest[None]])
            return jnp.where(paired, pushed, pairs)

        new_state = FLDetectorState(
            expected=expected.at[ids].set(jnp.where(mask[:, None], U, expected[ids])),
            seen=state.seen.at[ids].set(state.seen[ids] | mask),
            errors=errors,
            num_errors=num_errors,
            steps=push(state.steps, step),
            changes=push(state.changes, change),
            num_pairs=jnp.minimum(state.num_pairs + paired, window),
            aggregate=jnp.where(keep.any(), aggregate, state.aggregate),
            fresh=keep.any(),
            rounds=state.rounds + 1,
            rounds_judged=rounds_judged,
            excluded=excluded,
        )
        details = {
            "error": error,
            "clusters": jnp.full(len(U), clusters, jnp.float32),
        }
        scores = jnp.where(mask, scores, jnp.inf)
        return (
            unravel(aggregate),
            new_state,
            AggregatorInfo(weights, ~keep, scores, details),
        )

    needs = frozenset({"client_ids", "key", "params", "previous_params"})
    return Aggregator(init, apply, validate, needs, "fldetector")


def draw_references(key: Array, num_references: int, size: int) -> Array:
    """Uniform values on [0, 1), ``[num_references, size]``."""
    return jax.random.uniform(key, (num_references, size))


def hessian_vector_product(
    steps: Array, changes: Array, num_pairs: Array | int, v: Array
) -> tuple[Array, Array]:
    """``B v`` for the BFGS matrix B of the last pairs, by its compact form.

    Starts from ``sigma I``, ``sigma = y.s / s.s`` of the newest pair, and takes up the
    pairs from the oldest on. Only matrices of ``2 W`` rows are formed.

    Args:
        steps: changes s of the model ``[W, d]``, oldest first.
        changes: the changes y of the gradient ``[W, d]``.
        num_pairs: how many of the last rows count; the others are zero.
        v: ``[d]``.

    Returns:
        The product ``[d]`` and whether it is valid: there is a pair, ``sigma > 0`` and
        everything is finite. Zero where it is not.

    Example:
        >>> product, _ = hessian_vector_product(
        ...     jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 1.0]]), 1, jnp.ones(2))
        >>> product.tolist()
        [3.0, 3.5]

    References:
        Byrd, Nocedal, Schnabel, "Representations of quasi-Newton matrices and their use
        in limited memory methods", Mathematical Programming 1994.
    """

    def dot(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    window = len(steps)
    # B does not change when a pair is scaled. With |s| = 1, and y in units of sigma,
    # the system is as well-conditioned as the pairs allow.
    lengths = safe_norms(steps)
    S = steps / jnp.where(lengths > 0.0, lengths, 1.0)[:, None]
    Y = changes / jnp.where(lengths > 0.0, lengths, 1.0)[:, None]
    sigma = dot(S[-1], Y[-1])
    curved = (num_pairs > 0) & (sigma > 0.0)
    Y = Y / jnp.where(curved, sigma, 1.0)
    SY = dot(S, Y.T)
    lower = jnp.tril(SY, -1)
    unused = jnp.diag((jnp.arange(window) < window - num_pairs).astype(S.dtype))
    system = jnp.block(
        [[dot(S, S.T) + unused, lower], [lower.T, unused - jnp.diag(jnp.diagonal(SY))]]
    )
    weights = solve(system, jnp.concatenate([dot(S, v), dot(Y, v)]))
    product = sigma * (v - dot(weights[:window], S) - dot(weights[window:], Y))
    valid = curved & jnp.isfinite(jnp.sum(product * product))
    return jnp.where(valid, product, 0.0), valid


def prediction_errors(expected: Array, U: Array, judged: Array) -> Array:
    """``|expected_i - u_i|`` of the judged clients, divided by their sum, ``[n]``."""
    errors = jnp.where(judged, safe_norms(expected - U), 0.0)
    errors = jnp.minimum(errors, jnp.finfo(errors.dtype).max / (2 * len(U)))
    return normalize(errors)


def min_max(scores: Array, mask: Array) -> tuple[Array, Array]:
    """The participants' scores scaled to [0, 1], and whether they differ at all."""
    low = jnp.where(mask, scores, jnp.inf).min()
    high = jnp.where(mask, scores, -jnp.inf).max()
    differ = high > low
    scaled = (scores - low) / jnp.where(differ, high - low, 1.0)
    return jnp.where(mask & differ, scaled, 0.0), differ


def number_of_clusters(
    x: Array, references: Array, mask: Array, max_clusters: int
) -> tuple[Array, Array, Array]:
    """The gap statistic's number of clusters in the participants' numbers on [0, 1].

    ``Gap(k) = mean of log W_k over the references - log W_k``, with ``W_k`` the least
    sum of squares of k clusters, and the number is the first k with ``Gap(k) >= Gap(k +
    1) - s_{k+1}``.

    Args:
        x: ``[n]``.
        references: ``[R, n]``; of each, as many values count as clients take part.
        mask: ``bool [n]``, who takes part.
        max_clusters: K, the answer where no k satisfies the condition.

    Returns:
        ``int32 []``, the gaps ``[K]`` and the ``s_k [K]``.
    """

    def log_w(x: Array, mask: Array) -> Array:
        return jnp.log(jnp.maximum(sums_of_squares(x, mask, max_clusters), 1e-12))

    first = jnp.arange(len(x)) < mask.sum()
    of_references = jax.vmap(log_w, (0, None))(references, first)
    gaps = of_references.mean(axis=0) - log_w(x, mask)
    s = of_references.std(axis=0) * jnp.sqrt(1.0 + 1.0 / len(references))
    enough = gaps[:-1] >= gaps[1:] - s[1:]
    k = jnp.where(enough.any(), jnp.argmax(enough) + 1, max_clusters)
    return k, gaps, s
