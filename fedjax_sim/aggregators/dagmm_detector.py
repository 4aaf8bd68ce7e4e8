"""Density-based detection: who a mixture of honest models finds unlikely, goes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_sim.aggregators.pretraining import (
    View,
    check_pretraining,
    check_rate,
    detector,
    finite_scores,
    fit,
    highest,
    learn_view,
)
from fedjax_sim.registry import check_number
from fedjax_sim.types import (
    Aggregator,
    Array,
    Params,
    PyTree,
    RoundContext,
    Train,
)

_REJECTS = {
    "count": "the f highest energies",
    "quantile": "energies above the (1 - f / n)-quantile of pre-training",
}
# Added to the diagonal of every covariance.
EPSILON = 1e-6
_DROPOUT = 0.5


class DAGMM(nn.Module):
    """A deep autoencoder whose code, and what it loses, fall into a few Gaussians.

    Attributes:
        size: c, values in and out.
        hidden: units of each of the two hidden layers of encoder and decoder.
        latent: of the code.
        estimator: units of each of the two hidden layers of the estimation network.
        components: K, Gaussians.
    """

    size: int
    hidden: int
    latent: int
    estimator: int
    components: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> tuple[Array, Array, Array]:
        """``[b, c]`` -> output, features ``[b, q]`` and memberships ``[b, K]``.

        With ``train``, half of the estimation network's units are dropped.
        """
        h = nn.tanh(nn.Dense(self.hidden, name="encoder_0")(x))
        h = nn.tanh(nn.Dense(self.hidden, name="encoder_1")(h))
        code = nn.Dense(self.latent, name="code")(h)
        h = nn.tanh(nn.Dense(self.hidden, name="decoder_0")(code))
        h = nn.tanh(nn.Dense(self.hidden, name="decoder_1")(h))
        output = nn.Dense(self.size, name="output")(h)
        z = jnp.concatenate([code, features(x, output)], axis=1)
        h = nn.tanh(nn.Dense(self.estimator, name="estimator_0")(z))
        h = nn.tanh(nn.Dense(self.estimator, name="estimator_1")(h))
        h = nn.Dropout(_DROPOUT, deterministic=not train)(h)
        return output, z, nn.softmax(nn.Dense(self.components, name="member")(h))


class Mixture(NamedTuple):
    """Gaussians in a form that asks for no decomposition in a round.

    Attributes:
        log_weight: ``[K]``, log phi.
        mean: ``[K, q]``.
        whiten: ``[K, q, q]``, the inverse Cholesky factor of the covariance.
        log_det: ``[K]``, of ``2 pi`` times the covariance.
    """

    log_weight: Array
    mean: Array
    whiten: Array
    log_det: Array


class DAGMMState(NamedTuple):
    """What ``dagmm_detector`` has learned; the same in every round.

    ``energies`` are those of the pre-training vectors, ascending.
    """

    view: View
    net: PyTree
    mixture: Mixture
    energies: Array


def dagmm_detector(
    max_byzantine: int,
    base: str = "fedavg",
    reject: str = "count",
    *,
    space: str = "weights",
    hidden: int = 128,
    latent: int = 2,
    estimator: int = 32,
    components: int = 2,
    energy_weight: float = 0.1,
    covariance_weight: float = 0.005,
    num_coordinates: int = 4096,
    num_snapshots: int = 100,
    num_steps: int = 500,
    learning_rate: float = 1e-3,
) -> Aggregator:
    """Removes clients whose models are unlikely under a mixture of honest models.

    Before the first round the server trains the model alone on its root dataset, and
    teaches a deep autoencoding Gaussian mixture model what it has after each local
    training. For a client's model x, decoded as ``x'`` from its code ``z_c``::

        z = [z_c, |x - x'| / |x|, cos(x, x')]
        energy = -log sum_k phi_k exp(-1/2 (z - mu_k)' S_k^-1 (z - mu_k))
                             / sqrt |2 pi S_k|

    with phi, mu and S weighted by the estimation network's memberships of the
    pre-training vectors. The f clients of highest energy are removed
    (``reject="count"``), or those above the ``1 - f / n`` quantile of the energies in
    pre-training (``"quantile"``), and the base is applied to the others. Both networks
    are trained on ``|x - x'|^2 + l1 energy + l2 sum_kj 1 / S_kjj``, means over vectors.

    Assumptions: models that the server trains are like honest clients' models, also
    those of later rounds, which pre-training did not come to. With ``"count"`` f
    clients go in every round, with an attack or without. Code, relative distance and
    cosine are bounded: how far away a model is, they do not show.

    Cost: O(n c hidden) a round. Pre-training: ``num_snapshots`` local trainings and
    ``num_steps`` steps on as many vectors of c values.

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort.
        base: the rule for those who are left: ``"fedavg"``, ``"krum"``,
            ``"trimmed_mean"`` or ``"median"``.
        reject: ``"count"`` or ``"quantile"``, see above.
        space: ``"weights"`` looks at models, ``"update"`` at updates.
        hidden: units of each of the two layers of encoder and decoder.
        latent: size of the code.
        estimator: units of each of the two layers of the estimation network.
        components: K, Gaussians of the mixture.
        energy_weight: l1.
        covariance_weight: l2.
        num_coordinates: c, coordinates looked at, drawn once; all, if there are fewer.
        num_snapshots: local trainings of the server, one after the other; at least 2.
        num_steps: steps of Adam, each on all vectors.
        learning_rate: of Adam.

    Returns:
        An ``Aggregator`` that is pre-trained (see ``Aggregator.pretrain``). It needs
        ``params`` in weight space. Its state is a ``DAGMMState``. Removed clients are
        flagged; scores ``[n]`` are energies.

    Raises:
        ValueError: an option out of range; from ``init``, always; from ``validate``
            where ``n <= f`` or the base cannot work; from ``apply``, a context field
            missing.

    Example:
        >>> rule = dagmm_detector(1, space="update", num_steps=50)
        >>> def train(key, w):
        ...     return jnp.array([1.0, 0.0]) + 0.1 * jax.random.normal(key, 2)
        >>> state = rule.pretrain(jnp.zeros(2), jax.random.key(0), train)
        >>> U = jnp.array([[1.0, 0.0], [1.1, 0.1], [0.9, -0.1], [-5.0, 5.0]])
        >>> rule.apply(U, state, RoundContext())[2].flagged.tolist()
        [False, False, False, True]

    References:
        Zong, Song, Min, Cheng, Lumezanu, Cho, Chen, "Deep autoencoding Gaussian mixture
        model for unsupervised anomaly detection", ICLR 2018.

        Lin, Du, Liu, "Free-riders in federated learning: attacks and defenses",
        arXiv:1911.12560, 2019.

    Differs from the papers: how the input is scaled, the size of the code and K are our
    choice: every coordinate is standardised, with a floor under its standard deviation
    (a tenth of the mean one). 1e-6 is added to the diagonal of S. Rows left out of the
    round are taken for Byzantine. Energies are capped where float32 ends.
    """
    check_pretraining(
        "dagmm_detector",
        max_byzantine,
        base,
        space,
        reject,
        _REJECTS,
        hidden=hidden,
        latent=latent,
        estimator=estimator,
        components=components,
        num_coordinates=num_coordinates,
        num_snapshots=num_snapshots,
        num_steps=num_steps,
    )
    learning_rate = check_rate("dagmm_detector", learning_rate)
    for name, value in (
        ("energy_weight", energy_weight),
        ("covariance_weight", covariance_weight),
    ):
        check_number(f"dagmm_detector's {name}", value, 0, closed="[)")

    def module(size: int) -> DAGMM:
        return DAGMM(size, hidden, latent, estimator, components)

    def judge(
        state: DAGMMState, x: Array, mask: Array, f: Array, context: RoundContext
    ) -> tuple[Array, Array]:
        found: Any = module(x.shape[1]).apply({"params": state.net}, x, train=False)
        scores = finite_scores(energies(found[1], state.mixture))
        if reject == "count":
            return scores, highest(scores, mask, f)
        share = 1.0 - f / jnp.maximum(mask.sum(), 1)
        return scores, mask & (scores > jnp.quantile(state.energies, share))

    pretrain = _pretraining(
        module(0),
        space,
        energy_weight,
        covariance_weight,
        num_coordinates,
        num_snapshots,
        num_steps,
        learning_rate,
    )
    return detector(
        "dagmm_detector", max_byzantine, base, space, DAGMMState, pretrain, judge
    )


@functools.cache
def _pretraining(
    net_of: DAGMM,
    space: str,
    energy_weight: float,
    covariance_weight: float,
    num_coordinates: int,
    num_snapshots: int,
    num_steps: int,
    learning_rate: float,
) -> Callable[[Params, Array, Train], DAGMMState]:
    """``Aggregator.pretrain``: one function for all rules that learn the same.

    ``net_of`` is the network but for its size.
    """

    def pretrain(params: Params, key: Array, train: Train) -> DAGMMState:
        look_key, start_key, fit_key = jax.random.split(key, 3)
        view, x = learn_view(
            params, look_key, train, num_snapshots, num_coordinates, space
        )
        module = net_of.clone(size=x.shape[1])

        def loss(net: PyTree, key: Array) -> Array:
            seen: Any = module.apply(
                {"params": net}, x, train=True, rngs={"dropout": key}
            )
            output, z, members = seen
            phi, mean, covariance = mixture_moments(z, members)
            mixture = factorised(phi, mean, covariance)
            diagonal = jnp.diagonal(covariance, axis1=1, axis2=2)
            return (
                jnp.square(x - output).sum(axis=1).mean()
                + energy_weight * energies(z, mixture).mean()
                + covariance_weight * jnp.sum(1.0 / (diagonal + EPSILON))
            )

        net = module.init(start_key, x, train=False)["params"]
        net = fit(loss, net, fit_key, num_steps, learning_rate)
        found: Any = module.apply({"params": net}, x, train=False)
        _, z, members = found
        mixture = factorised(*mixture_moments(z, members))
        return DAGMMState(view, net, mixture, jnp.sort(energies(z, mixture)))

    return pretrain


def features(x: Array, output: Array) -> Array:
    """``[b, 2]``: the relative distance ``|x - x'| / |x|`` and the cosine.

    Example:
        >>> features(jnp.array([[3.0, 4.0]]), jnp.array([[3.0, 0.0]])).tolist()
        [[0.800000011920929, 0.6000000238418579]]
    """

    def norm(v: Array) -> Array:
        return jnp.sqrt(jnp.maximum(jnp.square(v).sum(axis=1), 1e-24))

    away = jnp.where((x != output).any(axis=1), norm(x - output), 0.0)
    distance = away / norm(x)
    cosine = (x * output).sum(axis=1) / (norm(x) * norm(output))
    return jnp.stack([distance, cosine], axis=1)


def mixture_moments(z: Array, members: Array) -> tuple[Array, Array, Array]:
    """phi ``[K]``, mu ``[K, q]`` and S ``[K, q, q]`` by memberships ``[b, K]``.

    Example:
        >>> z = jnp.array([[0.0], [2.0], [7.0], [9.0]])
        >>> members = jnp.eye(2)[jnp.array([0, 0, 1, 1])]
        >>> [x.tolist() for x in mixture_moments(z, members)]
        [[0.5, 0.5], [[1.0], [8.0]], [[[1.0]], [[1.0]]]]
    """
    total = jnp.maximum(members.sum(axis=0), 1e-12)
    mean = members.T @ z / total[:, None]
    off = z[:, None] - mean[None]
    covariance = jnp.einsum("bk,bki,bkj->kij", members, off, off)
    return members.mean(axis=0), mean, covariance / total[:, None, None]


def factorised(phi: Array, mean: Array, covariance: Array) -> Mixture:
    """The mixture, ``EPSILON`` added to the diagonal of its covariances."""
    size = mean.shape[1]
    lower = jnp.linalg.cholesky(covariance + EPSILON * jnp.eye(size)[None])
    unit = jnp.broadcast_to(jnp.eye(size), covariance.shape)
    whiten = jax.scipy.linalg.solve_triangular(lower, unit, lower=True)
    diagonal = jnp.diagonal(lower, axis1=1, axis2=2)
    log_det = size * jnp.log(2.0 * jnp.pi) + 2.0 * jnp.log(diagonal).sum(axis=1)
    return Mixture(jnp.log(jnp.maximum(phi, 1e-12)), mean, whiten, log_det)


def energies(z: Array, mixture: Mixture) -> Array:
    """``[b]``: minus the log density of ``z [b, q]`` under the mixture.

    Example:
        >>> one = factorised(jnp.ones(1), jnp.zeros((1, 2)), jnp.eye(2)[None])
        >>> energies(jnp.array([[0.0, 0.0], [3.0, 4.0]]), one).round(3).tolist()
        [1.8380000591278076, 14.338000297546387]
    """
    off = z[:, None] - mixture.mean[None]
    white = jnp.einsum("kij,bkj->bki", mixture.whiten, off)
    log_density = -0.5 * (jnp.square(white).sum(axis=2) + mixture.log_det[None])
    return -jax.nn.logsumexp(mixture.log_weight[None] + log_density, axis=1)
