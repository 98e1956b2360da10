"""The transitions of the last rollouts, each with the log-probs of its time: what off-policy updates draw from (DPOK)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastloop.checkpoints import readable, same_iteration
from fastloop.ranks import Ranks
from fastloop.rollout import Trajectories

_FILE = "replay-{}.pt"  # of each rank
_AXES = {"latents": 1, "log_probs": 1, "ids": 0}  # those of trajectories


class Replay:
    """The newest of so many rollouts, N trajectories each, of which this rank keeps those that it drew.

    The newest takes the place of the oldest, so that every trajectory is stored once and none is moved.
    """

    def __init__(self, rollouts: int, ranks: Ranks, trajectories: int) -> None:
        """Args:
        trajectories: N, those of one rollout on all ranks.
        """
        self.rollouts, self.ranks, self.n, self.drawn = rollouts, ranks, trajectories, len(ranks.padded(trajectories))
        self.kept: list[int | None] = []  # iterations in which they were drawn, by their place
        self._all: Trajectories | None = None  # room for all; prompts of those that are there
        self._rewards = torch.empty(0)  # of all ranks, a row for each rollout

    def add(self, new: Trajectories, rewards: torch.Tensor, iteration: int) -> tuple[Trajectories, torch.Tensor]:
        """Take in a rollout, and return what is kept, with one after the other of what came with its trajectories.

        Args:
            rewards: float32 (M,), of all ranks: a value for each trajectory, its advantage say, or for each of its rows.
            iteration: the finished ones.

        Returns:
            The trajectories of this rank, for `PolicyUpdate`, and float32 (R M,), of all R rollouts.
        """
        place = iteration % self.rollouts
        self._put(place, new.latents, new.log_probs, new.ids, new.prompts, rewards)
        self.kept[place : place + 1] = [iteration]
        return replace(self._all, images=new.images), self._rewards[: len(self.kept)].flatten()

    def save(self, folder: Path, finished: int) -> None:
        """Write what the iteration after ``finished`` ones will train on again: this rank's share of it.

        Args:
            folder: of a checkpoint that is being written.
        """
        replaced = finished % self.rollouts
        places = [place for place, drawn in enumerate(self.kept) if drawn is not None and place != replaced]
        share, found = len(self.ranks.share(self.n)), []
        for place in places:
            of_place = slice(place * self.drawn, place * self.drawn + share)
            tensors = {name: getattr(self._all, name).narrow(axis, of_place.start, share) for name, axis in _AXES.items()}
            tensors = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
            found.append({"place": place, "drawn": self.kept[place], "prompts": self._all.prompts[of_place], **tensors})
        state = {"iteration": finished, "world": self.ranks.world, "full": len(self.kept) == self.rollouts, "rollouts": found}
        torch.save(state | {"rewards": self._rewards[places]}, folder / _FILE.format(self.ranks.rank))

    def load(self, checkpoint: Path, device: torch.device, on_host: bool) -> None:
        """Take back what ranks have saved, whatever their number.

        Args:
            device: of log-probs and numbers, and of latents unless they are ``on_host``.

        Raises:
            UserError: a file is missing, damaged or of another iteration.
        """
        with readable(checkpoint):
            first = torch.load(checkpoint / _FILE.format(0), weights_only=True)
            others = (torch.load(checkpoint / _FILE.format(rank), weights_only=True) for rank in range(1, first["world"]))
            saved = [first, *others]
            for rank, of_rank in enumerate(saved):
                same_iteration(checkpoint, _FILE.format(rank), of_rank["iteration"])
        self.kept = [None] * (self.rollouts if first["full"] else len(first["rollouts"]))
        own = torch.tensor(self.ranks.padded(self.n))
        for i, rewards in enumerate(first["rewards"]):
            parts = [of_rank["rollouts"][i] for of_rank in saved]
            tensors = {
                name: torch.cat([part[name] for part in parts], axis).index_select(axis, own) for name, axis in _AXES.items()
            }
            tensors = {name: of if name == "latents" and on_host else of.to(device) for name, of in tensors.items()}
            if on_host and device.type == "cuda":
                tensors["latents"] = tensors["latents"].pin_memory()
            prompts = [prompt for part in parts for prompt in part["prompts"]]
            self._put(parts[0]["place"], **tensors, prompts=[prompts[k] for k in own.tolist()], rewards=rewards)
            self.kept[parts[0]["place"]] = parts[0]["drawn"]

    def _put(self, place: int, latents, log_probs, ids, prompts: list[str], rewards: torch.Tensor) -> None:
        if self._all is None:
            latents_room, log_probs_room, ids_room = (self._room(*of) for of in ((latents, 1), (log_probs, 1), (ids, 0)))
            self._all = Trajectories(latents_room, log_probs_room, [], ids_room, np.empty(0))
            self._rewards = rewards.new_zeros(self.rollouts, len(rewards))
        at = slice(place * self.drawn, (place + 1) * self.drawn)
        self._all.latents[:, at].copy_(latents)
        self._all.log_probs[:, at].copy_(log_probs)
        self._all.ids[at].copy_(ids)
        self._all.prompts += [""] * (at.start - len(self._all.prompts))  # of one that was not saved, for it is replaced next
        self._all.prompts[at] = prompts
        self._rewards[place].copy_(rewards)

    def _room(self, like: torch.Tensor, axis: int) -> torch.Tensor:
        """For as many rollouts, where one of them is: on its device, pinned if it is."""
        shape = [size * (self.rollouts if i == axis else 1) for i, size in enumerate(like.shape)]
        return torch.zeros(shape, dtype=like.dtype, device=like.device, pin_memory=like.is_pinned())
