"""The filters that each subnet keeps, so that its exact MACs are what the budget leaves."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from ftwt_jax.errors import UserError

# Exact MACs of the networks that keep the groups bool [K, G]: [K].
CountMacs = Callable[[Bool[np.ndarray, "K G"]], Float[np.ndarray, " K"]]
# How far a subnet's MACs reduction may be from the budget before single filters are moved, and moves that are tried.
CLOSE, MOVES = 5e-4, 40
# What is close enough where only moves of two blocks at once come closer, and the most blocks of which pairs are tried.
ENOUGH, _PAIRED = 2.5e-3, 40
_HALVINGS = 30


def choose_groups(
    rates: Float[np.ndarray, "K G"],
    blocks: list[Int[np.ndarray, " B"]],
    count_macs: CountMacs,
    dense_macs: float,
    budget: float,
    multiple: int = 1,
) -> Bool[np.ndarray, "K G"]:
    """The groups of filters to keep in each subnet.

    In a block, whose groups are filters of the same layers, the subnet keeps the groups that its images want most
    often: as many as its images want in the mean, and a share more or fewer, the same in every block, by which the
    budget is met. A common threshold for the rates of all blocks would empty those whose filters are each wanted by
    few images.

    Args:
      rates: the share of a subnet's images that want each group.
      budget: MACs reduction of each subnet.
      multiple: keep a multiple of this many groups in each block, in small ones of half their size; or the whole block.

    Raises:
      UserError: no choice of filters has this reduction; the message gives the range.
    """
    order = [np.argsort(-rates[:, block], axis=1, kind="stable") for block in blocks]
    sizes, multiples = _steps(blocks, multiple)
    wanted = np.stack([rates[:, block].sum(axis=1) for block in blocks], axis=1)

    def rounded(counts: np.ndarray) -> np.ndarray:
        steps = np.maximum(np.rint(counts / multiples), 1).astype(int) * multiples
        return np.minimum(steps, sizes)

    def kept(counts: np.ndarray, subnets: np.ndarray) -> np.ndarray:
        found = np.zeros((len(counts), rates.shape[1]), bool)
        for index, block in enumerate(blocks):
            for row, subnet in enumerate(subnets):
                found[row, block[order[index][subnet, : counts[row, index]]]] = True
        return found

    every = np.arange(len(rates))

    def reduction(counts: np.ndarray, subnets: np.ndarray = every) -> np.ndarray:
        return 1 - count_macs(kept(counts, subnets)) / dense_macs

    least, most = reduction_range(blocks, count_macs, dense_macs, multiple)
    if not least - CLOSE <= budget <= most + CLOSE:
        raise UserError(
            f"no subnets have a MACs reduction of {budget:g}: those of this network can have {least:.3f} to {most:.3f}"
        )
    low, high = -np.ones(len(rates)), np.ones(len(rates))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        over = reduction(rounded(wanted + middle[:, None] * sizes)) < budget
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    counts = rounded(wanted + low[:, None] * sizes)
    for subnet in range(len(rates)):
        counts[subnet] = _closer(counts[subnet], subnet, sizes, multiples, budget, reduction)
    return kept(counts, every)


def reduction_range(
    blocks: list[Int[np.ndarray, " B"]], count_macs: CountMacs, dense_macs: float, multiple: int = 1
) -> tuple[float, float]:
    """The least and the most MACs reduction that a subnet can have; arguments as of `choose_groups`."""
    kept = np.ones((2, sum(map(len, blocks))), bool)
    for block, step in zip(blocks, _steps(blocks, multiple)[1], strict=True):
        kept[1, block[step:]] = False
    least, most = 1 - count_macs(kept) / dense_macs
    return float(least), float(most)


def _steps(blocks: list[np.ndarray], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of groups of each block, and of what it keeps a multiple."""
    sizes = np.array([len(block) for block in blocks])
    return sizes, np.clip(sizes // 2, 1, multiple)


def _closer(
    counts: np.ndarray,
    subnet: int,
    sizes: np.ndarray,
    multiples: np.ndarray,
    budget: float,
    reduction: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """Counts of one subnet after moves that bring it to the budget: of one block, where these do not help of two."""

    def off(rows: np.ndarray) -> np.ndarray:
        return np.abs(reduction(rows, np.full(len(rows), subnet)) - budget)

    best = float(off(counts[None])[0])
    for _ in range(MOVES):
        if best <= CLOSE:
            break
        moves = _moves(counts, sizes, multiples)
        found = off(moves)
        if best > ENOUGH and found.min() >= best and len(sizes) <= _PAIRED:
            moves = np.concatenate([_moves(move, sizes, multiples) for move in moves])
            found = off(moves)
        if found.min() >= best:
            break
        counts, best = moves[np.argmin(found)], float(found.min())
    return counts


def _moves(counts: np.ndarray, sizes: np.ndarray, multiples: np.ndarray) -> np.ndarray:
    """All counts with one block a step larger or smaller; [moves, blocks]."""
    moves = []
    for block, (size, multiple) in enumerate(zip(sizes, multiples, strict=True)):
        # A whole block need not be a multiple.
        down = (size - 1) // multiple * multiple if counts[block] == size else counts[block] - multiple
        for target in (down, min(counts[block] + multiple, size)):
            if multiple <= target != counts[block]:
                moves.append(np.concatenate([counts[:block], [target], counts[block + 1 :]]))
    return np.stack(moves) if moves else counts[None]
