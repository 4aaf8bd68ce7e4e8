"""Spectral anomaly detection: who a model of honest models does not know, goes."""

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
from fedjax_sim.registry import check_count, lookup, require
from fedjax_sim.types import (
    Aggregator,
    Array,
    Params,
    PyTree,
    RoundContext,
    Train,
)

_REJECTS = {"mean": "scores above the mean", "count": "the f highest scores"}
_LEARNERS = {"vae": "variational autoencoder", "pca": "principal components"}


class VAE(nn.Module):
    """A variational autoencoder with two hidden layers on either side.

    Attributes:
        size: c, values in and out.
        hidden: units of each hidden layer.
        latent: of the code.
    """

    size: int
    hidden: int
    latent: int

    def setup(self) -> None:
        self.encoder = [nn.Dense(self.hidden), nn.Dense(self.hidden)]
        self.to_mean = nn.Dense(self.latent)
        self.to_spread = nn.Dense(self.latent)
        self.decoder = [nn.Dense(self.hidden), nn.Dense(self.hidden)]
        self.to_output = nn.Dense(self.size)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """``[b, c] -> `` mean and log variance of the code, ``[b, latent]`` each."""
        for layer in self.encoder:
            x = nn.relu(layer(x))
        return self.to_mean(x), nn.softplus(self.to_spread(x))

    def decode(self, z: Array) -> Array:
        """``[b, latent] -> [b, c]``."""
        for layer in self.decoder:
            z = nn.relu(layer(z))
        return self.to_output(z)

    def __call__(self, x: Array, noise: Array) -> tuple[Array, Array, Array]:
        """``[b, c]`` and ``[b, latent]`` -> output, mean and log variance."""
        mean, log_variance = self.encode(x)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        return self.decode(z), mean, log_variance


class VAEState(NamedTuple):
    """What ``vae_detector`` has learned; the same in every round.

    ``net`` are the parameters of the VAE, or ``[k, c]``, the first principal components
    of the standardised pre-training vectors.
    """

    view: View
    net: PyTree


def vae_detector(
    max_byzantine: int,
    base: str = "fedavg",
    reject: str = "mean",
    *,
    learner: str = "vae",
    space: str = "weights",
    hidden: int = 500,
    latent: int = 20,
    draws: int = 0,
    num_coordinates: int = 4096,
    num_snapshots: int = 100,
    num_steps: int = 500,
    learning_rate: float = 1e-3,
) -> Aggregator:
    """Removes clients whose models an autoencoder of honest models does not reproduce.

    Before the first round the server trains the model alone on its root dataset and
    teaches a variational autoencoder what it has after each local training, some
    coordinates of it, standardised. In a round, with ``(mu, log s2)`` the code of
    client i's model x and ``x'`` what is decoded from mu::

        score_i = sum_j (x_j - x'_j)^2 - 1/2 sum_l (1 + log s2_l - mu_l^2 - s2_l)

    Who scores above the mean of the participants is removed (``reject="mean"``), or the
    f who score highest (``"count"``), and the base is applied to the others.

    Assumptions: models that the server trains are like honest clients' models, also
    those of later rounds, which pre-training did not come to. Above the mean there is
    always somebody, with an attack or without.

    Cost: O(n c hidden) a round. Pre-training: ``num_snapshots`` local trainings and
    ``num_steps`` steps on as many vectors of c values.

    Args:
        max_byzantine: f, the number of Byzantine clients in a cohort.
        base: the rule for those who are left: ``"fedavg"``, ``"krum"``,
            ``"trimmed_mean"`` or ``"median"``.
        reject: ``"mean"`` or ``"count"``, see above.
        learner: ``"vae"``, or ``"pca"`` for its linear stand-in: the score is the
            squared distance to the space of the first ``latent`` principal components.
        space: ``"weights"`` looks at models, ``"update"`` at updates.
        hidden: units of each of the two layers of encoder and decoder.
        latent: size of the code; the study of PDRR has 100. With ``"pca"``, below
            ``num_snapshots`` and the number of coordinates.
        draws: 0 decodes the mean of the code; otherwise the squared error is averaged
            over that many draws of it.
        num_coordinates: c, coordinates looked at, drawn once; all, if there are fewer.
        num_snapshots: local trainings of the server, one after the other; at least 2.
        num_steps: steps of Adam, each on all vectors.
        learning_rate: of Adam.

    Returns:
        An ``Aggregator`` that is pre-trained (see ``Aggregator.pretrain``). It needs
        ``params`` in weight space, and ``key`` with ``draws``. Its state is a
        ``VAEState``. Removed clients are flagged; scores ``[n]`` as above.

    Raises:
        ValueError: an option out of range; from ``init``, always; from ``validate``
            where ``n <= f`` or the base cannot work; from ``pretrain``, more components
            than coordinates; from ``apply``, a context field missing.

    Example:
        >>> rule = vae_detector(1, learner="pca", latent=1, space="update")
        >>> def train(key, w):
        ...     return jnp.array([1.0, 0.0]) + 0.1 * jax.random.normal(key, 2)
        >>> state = rule.pretrain(jnp.zeros(2), jax.random.key(0), train)
        >>> U = jnp.array([[1.0, 0.0], [1.1, 0.1], [0.9, -0.1], [-5.0, 5.0]])
        >>> rule.apply(U, state, RoundContext())[2].flagged.tolist()
        [False, False, False, True]

    References:
        Li, Cheng, Wang, Liu, Chen, "Learning to detect malicious clients for robust
        federated learning", arXiv:2002.00211, 2020.

    Differs from the paper: it does not say how the input is scaled; here every
    coordinate is standardised, with a floor under its standard deviation (a tenth of
    the mean one), and the decoder's output is linear. Its code draws the code of each
    vector once, so that its scores are random; by default none is drawn. Rows left out
    of the round are taken for Byzantine. Scores are capped where float32 ends.
    """
    check_pretraining(
        "vae_detector",
        max_byzantine,
        base,
        space,
        reject,
        _REJECTS,
        hidden=hidden,
        latent=latent,
        num_coordinates=num_coordinates,
        num_snapshots=num_snapshots,
        num_steps=num_steps,
    )
    lookup("learner of vae_detector", learner, _LEARNERS)
    if learner == "pca" and latent >= num_snapshots:
        raise ValueError(
            f"vae_detector's latent must be below num_snapshots ({num_snapshots}) for "
            "the learner pca: around their mean, that many vectors lie in a space of "
            f"{num_snapshots - 1} dimensions; got {latent}."
        )
    draws = check_count("vae_detector's draws", draws, 0)
    learning_rate = check_rate("vae_detector", learning_rate)

    def score(state: VAEState, x: Array, context: RoundContext) -> Array:
        if learner == "pca":
            return residuals(x, state.net)
        module = VAE(x.shape[1], hidden, latent)
        net = {"params": state.net}
        code: Any = module.apply(net, x, method="encode")
        if draws == 0:
            output: Any = module.apply(net, code[0], method="decode")
            return vae_scores(x, output, *code)

        def one(key: Array) -> Array:
            seen: Any = module.apply(net, x, jax.random.normal(key, code[0].shape))
            return vae_scores(x, *seen)

        key = require("vae_detector with draws", context, "key")
        return jax.lax.map(one, jax.random.split(key, draws)).mean(axis=0)

    def judge(
        state: VAEState, x: Array, mask: Array, f: Array, context: RoundContext
    ) -> tuple[Array, Array]:
        scores = finite_scores(score(state, x, context))
        if reject == "count":
            return scores, highest(scores, mask, f)
        return scores, above_mean(scores, mask)

    pretrain = _pretraining(
        learner,
        space,
        hidden,
        latent,
        num_coordinates,
        num_snapshots,
        num_steps,
        learning_rate,
    )
    needs = frozenset({"key"} if draws else ())
    return detector(
        "vae_detector",
        max_byzantine,
        base,
        space,
        VAEState,
        pretrain,
        judge,
        needs,
    )


@functools.cache
def _pretraining(
    learner: str,
    space: str,
    hidden: int,
    latent: int,
    num_coordinates: int,
    num_snapshots: int,
    num_steps: int,
    learning_rate: float,
) -> Callable[[Params, Array, Train], VAEState]:
    """``Aggregator.pretrain``: one function for all rules that learn the same."""

    def pretrain(params: Params, key: Array, train: Train) -> VAEState:
        look_key, start_key, fit_key = jax.random.split(key, 3)
        view, x = learn_view(
            params, look_key, train, num_snapshots, num_coordinates, space
        )
        if learner == "pca":
            if latent >= x.shape[1]:
                raise ValueError(
                    "vae_detector with the learner pca needs a latent below the "
                    f"coordinates it looks at, {x.shape[1]}, or nothing is left out of "
                    f"its space; got {latent}."
                )
            return VAEState(view, principal_components(x, latent))
        module = VAE(x.shape[1], hidden, latent)

        def loss(net: PyTree, key: Array) -> Array:
            noise = jax.random.normal(key, (len(x), latent))
            seen: Any = module.apply({"params": net}, x, noise)
            return vae_scores(x, *seen).mean()

        net = module.init(start_key, x, jnp.zeros((len(x), latent)))["params"]
        return VAEState(view, fit(loss, net, fit_key, num_steps, learning_rate))

    return pretrain


def vae_scores(x: Array, output: Array, mean: Array, log_variance: Array) -> Array:
    """Squared error plus divergence of the code from a standard normal one, ``[b]``.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> vae_scores(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 0.5]]), one, 0 * one)
        Array([0.75], dtype=float32)
    """
    divergence = 1.0 + log_variance - jnp.square(mean) - jnp.exp(log_variance)
    return jnp.square(x - output).sum(axis=1) - 0.5 * divergence.sum(axis=1)


def above_mean(scores: Array, mask: Array) -> Array:
    """``bool [n]``: participants whose score is above the mean of the participants."""
    # Above the lowest one, so that the mean of equal scores is that score exactly.
    lowest = jnp.where(mask, scores, jnp.inf).min()
    above = jnp.where(mask, scores - lowest, 0.0)
    return mask & (above > above.sum() / jnp.maximum(mask.sum(), 1))


def principal_components(x: Array, count: int) -> Array:
    """The first ``count`` right singular vectors ``[count, c]`` of ``x [b, c]``."""
    return jnp.linalg.svd(x, full_matrices=False)[2][:count]


def residuals(x: Array, components: Array) -> Array:
    """Squared distance ``[b]`` to the space of orthonormal ``components [k, c]``.

    Example:
        >>> residuals(jnp.array([[2.0, 0.0], [3.0, 0.5]]), jnp.array([[1.0, 0.0]]))
        Array([0.  , 0.25], dtype=float32)
    """
    highest = jax.lax.Precision.HIGHEST
    codes = jnp.matmul(x, components.T, precision=highest)
    inside = jnp.matmul(codes, components, precision=highest)
    return jnp.square(x - inside).sum(axis=1)
