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

    def abandon(self) -> None:
        """Leave a thread that hangs to itself."""
        self._runner.abandon()


class Instances:
    """The free and the busy instances of one model version. Lives on the event loop. `models`: one per instance, possibly the same."""

    def __init__(self, name: str, models: Sequence[Model]) -> None:
        self._name = name
        self._all = [Instance(f"model {name} {i}", model) for i, model in enumerate(models)]
        self._stuck = 0

    def __repr__(self) -> str:
        return f"<Instances {self._name} {self._all} stuck={self._stuck}>"

    def __len__(self) -> int:
        return len(self._all)

    def free(self) -> Instance | None:
        """Return an instance that can compute now, or None."""
        for instance in self._all:
            if instance.batch is None and instance.ready:
                return instance
        return None

    def give_up(self, instance: Instance) -> None:
        """Replace an instance whose thread hangs by a fresh one, as often as there may be such threads; after that there is one fewer."""
        self._all.remove(instance)
        instance.abandon()
        self._stuck += 1
        if self._stuck <= _MAX_STUCK:
            self._all.append(Instance(f"{instance.name}'", instance.model))

    async def stop(self) -> None:
        """End every thread that still answers."""
        for instance in self._all:
            await instance.stop()
