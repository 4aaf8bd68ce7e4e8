"""Gaussian noise: sent instead of what was learned, or added to it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_sim.attacks.rows import (
    known_rows,
    mean_in_passes,
    mean_over,
    remembered,
    replace_rows,
    stateless,
    std_in_passes,
    std_over,
    taking_part,
    unconditional,
)
from fedjax_sim.passes import Rows
from fedjax_sim.registry import check_number, lookup, require
from fedjax_sim.types import Array, PyTree, RoundContext, UpdateAttack

NEEDS = frozenset({"byzantine", "client_ids", "key"})
MODES = {"replace": "N(mean, std^2)", "fitted": "N of the attackers' own rows"}


def normal_rows(key: Array, client_ids: Array, size: int) -> Array:
    """Independent standard normal values ``[k, size]``, float32.

    The draw of a row depends on the key and its client id alone, so it is the same
    wherever the row stands in the cohort.
    """
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, client_ids)
    return jax.vmap(lambda k: jax.random.normal(k, (size,), jnp.float32))(row_keys)


def gaussian(
    mean: float = 0.0, std: float = 1.0, mode: str = "replace"
) -> UpdateAttack:
    """Sends Gaussian noise, drawn independently by every attacker.

    With ``xi`` standard normal in every coordinate::

        mode="replace":  u' = mean + std xi
        mode="fitted":   u' = mu + sigma xi,  mu and sigma (ddof 0) per coordinate of
                         the attackers' own honestly trained updates

    Threat model: untargeted; ``replace`` needs no knowledge, ``fitted`` lets the
    attackers see each other's rows (those that take part and are finite; where there is
    none, the attackers send what they trained). The spread of a single row is 0: a lone
    ``fitted`` attacker sends what it trained.

    Cost: O(n d).

    Args:
        mean: mean of the noise, ``replace`` only.
        std: standard deviation of the noise, positive, ``replace`` only.
        mode: ``replace`` or ``fitted``.

    Returns:
        An ``UpdateAttack``, of strength ``std`` if ``replace``; needs ``byzantine``,
        ``key`` and ``client_ids``: the draw of a client does not depend on its place in
        the cohort.

    Raises:
        ValueError: ``mean`` not finite, ``std`` not finite and positive, unknown
            ``mode``, ``mean`` or ``std`` given with ``fitted``, or, while tracing, a
            context field missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(key=jax.random.key(0), client_ids=jnp.arange(2),
        ...                        byzantine=jnp.array([True, False]))
        >>> attack, U = gaussian(std=200.0), jnp.ones((2, 3))
        >>> attack.apply(U, attack.init(U[0], 2), context)[0][1].tolist()
        [1.0, 1.0, 1.0]

    References:
        P. Blanchard, E. M. El Mhamdi, R. Guerraoui and J. Stainer, "Machine learning
        with adversaries: Byzantine tolerant gradient descent", NeurIPS 2017 (replace,
        std 200 on gradients).

        M. Fang, X. Cao, J. Jia and N. Z. Gong, "Local model poisoning attacks to
        Byzantine-robust federated learning", USENIX Security 2020 (fitted).

    Differs from the paper:
        Blanchard et al. use ``std=200`` on gradients; 1 is later practice.
    """
    mean = check_number("gaussian's mean", mean)
    std = check_number("gaussian's std", std, low=0)
    lookup("mode of gaussian", mode, MODES)
    fitted = mode == "fitted"
    if fitted and (mean, std) != (0.0, 1.0):
        raise ValueError(
            "gaussian with mode='fitted' takes its mean and std from the attackers' "
            f"rows; got mean={mean}, std={std}. Drop them, or use mode='replace'."
        )

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("gaussian", context, "byzantine")
        key = require("gaussian", context, "key")
        client_ids = require("gaussian", context, "client_ids")
        known = known_rows(taking_part(updates, context), byzantine, "colluding")

        def craft(u: Array) -> Array:
            xi = normal_rows(key, client_ids, u.shape[1])
            if not fitted:
                return mean + state * xi
            mu = mean_over(known, u)
            return mu + std_over(known, u, mu) * xi

        replaced = byzantine & jnp.any(known) if fitted else byzantine
        return replace_rows(craft, replaced, updates), state

    def in_passes(
        rows: Rows, state: PyTree, context: RoundContext
    ) -> Callable[[Array, Array], Array]:
        byzantine = require("gaussian", context, "byzantine")
        key = require("gaussian", context, "key")
        client_ids = require("gaussian", context, "client_ids")
        mu = mean_in_passes(rows, byzantine)
        sigma = std_in_passes(rows, byzantine, mu)
        replaced = byzantine & jnp.any(rows.present & byzantine)

        def change(updates: Array, places: Array) -> Array:
            xi = normal_rows(key, client_ids[places], len(mu))
            crafted = mu[None] + sigma[None] * xi
            return jnp.where(replaced[places][:, None], crafted, updates)

        return change

    knowledge = "colluding" if fitted else "own"
    init = stateless if fitted else remembered(std)
    return UpdateAttack(
        init,
        apply,
        unconditional,
        knowledge,
        NEEDS,
        "gaussian",
        strength="" if fitted else "std",
        in_passes=in_passes if fitted else None,
    )


def additive_noise(std: float = 0.3) -> UpdateAttack:
    """Adds Gaussian noise to the honest update, drawn independently by every attacker.

    ``u' = u + std xi`` with ``xi`` standard normal in every coordinate.

    Threat model: untargeted, and without a direction; an attacker knows its own update
    only.

    Cost: O(n d).

    Args:
        std: standard deviation of the noise, positive.

    Returns:
        An ``UpdateAttack`` of strength ``std``; needs ``byzantine``, ``key`` and
        ``client_ids``: the draw of a client does not depend on its place in the cohort.

    Raises:
        ValueError: ``std`` not finite and positive, or, while tracing, a context field
            missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from fedjax_sim.types import RoundContext
        >>> context = RoundContext(key=jax.random.key(0), client_ids=jnp.arange(2),
        ...                        byzantine=jnp.array([True, False]))
        >>> attack, U = additive_noise(), jnp.ones((2, 3))
        >>> attack.apply(U, attack.init(U[0], 2), context)[0][1].tolist()
        [1.0, 1.0, 1.0]

    References:
        S. Li, Y. Cheng, W. Wang, Y. Liu and T. Chen, "Learning to detect malicious
        clients for robust federated learning", arXiv:2002.00211, 2020.

    Differs from the paper:
        The standard deviation of 0.3 is that of the authors' code.
    """
    std = check_number("additive_noise's std", std, low=0)

    def apply(
        updates: PyTree, state: PyTree, context: RoundContext
    ) -> tuple[PyTree, PyTree]:
        byzantine = require("additive_noise", context, "byzantine")
        key = require("additive_noise", context, "key")
        client_ids = require("additive_noise", context, "client_ids")

        def craft(u: Array) -> Array:
            return u + state * normal_rows(key, client_ids, u.shape[1])

        return replace_rows(craft, byzantine, updates), state

    return UpdateAttack(
        remembered(std), apply, unconditional, "own", NEEDS, "additive_noise", "std"
    )
