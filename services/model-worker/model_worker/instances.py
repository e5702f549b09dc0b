"""The instances of one model: threads side by side, each with the model or a process of its own, so that one slow batch blocks no other.

As Triton's instance groups (https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html#instance-groups).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from model_worker.backends import Model
from model_worker.process_instance import State
from model_worker.runner import Runner

_MAX_STUCK: Final = 4  # threads of one model that hang; each may hold a core, and none can be ended from outside


class Instance:
    """One thread, and the model it calls. `batch` is what it computes, None while free."""

    def __init__(self, name: str, model: Model) -> None:
        self.name = name
        self.model = model
        self.batch: Any = None
        self._runner = Runner(name, model.prepare_thread)

    def __repr__(self) -> str:
        return f"<Instance {self.name} {'busy' if self.batch is not None else 'free' if self.ready else 'starting'}>"

    @property
    def ready(self) -> bool:
        """False while its process is being started again."""
        return getattr(self.model, "state", State.READY) is State.READY

    def start(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `work` in the thread, then `done(result, error)` on the event loop."""
        self._runner.start(work, done)

    async def stop(self) -> None:
        """End the thread after what it was given."""
        await self._runner.stop()

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._runner.alive

    def abandon(self) -> None:
        """Leave a thread that hangs to itself."""
        self._runner.abandon()


class Instances:
    """The free and the busy instances of one model version. Lives on the event loop. `models`: one per instance, possibly the same."""

    def __init__(self, name: str, models: Sequence[Model]) -> None:
        self._name = name
        self._all = [Instance(f"model {name} {i}", model) for i, model in enumerate(models)]
        self._missing: list[Instance] = []  # given up, and there was no room for another thread
        self._given_up: list[Instance] = []

    def __repr__(self) -> str:
        return f"<Instances {self._name} {self._all} stuck={self.stuck}>"

    def __len__(self) -> int:
        return len(self._all)

    @property
    def stuck(self) -> int:
        """Threads that were given up and have not come back. What they compute with is still in memory."""
        return sum(instance.alive for instance in self._given_up)

    def free(self) -> Instance | None:
        """Return an instance that can compute now, or None."""
        for instance in self._all:
            if instance.batch is None and instance.ready:
                return instance
        if self._missing and self.stuck <= _MAX_STUCK:
            return self._replace(self._missing.pop())
        return None

    def give_up(self, instance: Instance) -> None:
        """Replace an instance whose thread hangs by a fresh one, as long as there may be such threads; after that there is one fewer until
        one of them comes back."""
        self._all.remove(instance)
        instance.abandon()
        self._given_up = [other for other in self._given_up if other.alive] + [instance]
        if self.stuck <= _MAX_STUCK:
            self._replace(instance)
        else:
            self._missing.append(instance)

    def abandon(self) -> None:
        """Give all of them up for good."""
        for instance in self._all:
            instance.abandon()
        self._given_up += self._all
        self._all, self._missing = [], []

    async def stop(self) -> None:
        """End every thread that still answers."""
        for instance in self._all:
            await instance.stop()

    async def ended(self) -> None:
        """Wait for the threads that were given up, which may be for ever."""
        for instance in self._given_up:
            await instance.stop()

    def _replace(self, instance: Instance) -> Instance:
        fresh = Instance(instance.name, instance.model)
        self._all.append(fresh)
        return fresh
