"""The server's root dataset: a few clean samples that no client has."""

import numpy as np

from fedjax_sim.registry import check_count


def draw_root(
    rng: np.random.Generator,
    targets: np.ndarray,
    size: int,
    bias: float | None = None,
    biased_class: int = 1,
) -> np.ndarray:
    """Chooses the samples of a root dataset, without replacement.

    Without ``bias``, uniformly among all samples (the paper's Case I). With it (Case
    II), ``round(bias * size)`` samples of ``biased_class`` and the others uniformly
    among the samples of the other classes; the class's share of the data, 0.1 with ten
    equal classes, is no bias.

    Args:
        rng: source of randomness.
        targets: labels of the candidates, ``int [s]``.
        size: number of root samples; 0 gives none.
        bias: share of the root dataset that is of ``biased_class``, in [0, 1].
        biased_class: that class; the paper has 1.

    Returns:
        Numbers of the chosen samples, ``int [size]``, in random order.

    Raises:
        ValueError: more samples asked for than there are, of a class or in all.

    Example:
        >>> targets = np.repeat([0, 1], 50)
        >>> rows = draw_root(np.random.default_rng(0), targets, 10, bias=0.8)
        >>> np.bincount(targets[rows]).tolist()
        [2, 8]

    References:
        Cao, Fang, Liu and Gong, "FLTrust: Byzantine-robust Federated Learning via Trust
        Bootstrapping", NDSS 2021.
    """
    size = check_count("root_size", size, 0)
    if size >= len(targets):
        raise ValueError(
            "root_size must leave training samples for the clients; got "
            f"root_size={size} of {len(targets)} samples. Lower root_size (FLTrust "
            "uses 100)."
        )
    if bias is None:
        return rng.choice(len(targets), size, replace=False)
    if not 0 <= bias <= 1:
        raise ValueError(
            f"root_bias is a share in [0, 1], or None for a uniform root dataset; got "
            f"root_bias={bias}."
        )
    in_class = np.flatnonzero(targets == biased_class)
    others = np.flatnonzero(targets != biased_class)
    num_in_class = round(bias * size)
    num_others = size - num_in_class
    if num_in_class > len(in_class) or num_others > len(others):
        raise ValueError(
            f"root_bias={bias} with root_size={size} needs {num_in_class} samples of "
            f"class {biased_class} and {num_others} of the others; got {len(in_class)} "
            f"and {len(others)} training samples. Lower root_size or change root_bias."
        )
    return rng.permutation(
        np.concatenate(
            [
                rng.choice(in_class, num_in_class, replace=False),
                rng.choice(others, num_others, replace=False),
            ]
        )
    )
