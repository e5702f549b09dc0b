"""A small invented data set in MovieLens' own file format, so that nothing here needs the real one or the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from marketplace import data as data_module
from marketplace import features as features_module
from marketplace import train
from marketplace.data import Dataset
from marketplace.features import Features
from marketplace.model import Ranker

# The names that MovieLens-100K has, because the committed manifests are made of them.
GENRES = [
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
    "unknown",
]
OCCUPATIONS = [
    "administrator",
    "artist",
    "doctor",
    "educator",
    "engineer",
    "entertainment",
    "executive",
    "healthcare",
    "homemaker",
    "lawyer",
    "librarian",
    "marketing",
    "none",
    "other",
    "programmer",
    "retired",
    "salesman",
    "scientist",
    "student",
    "technician",
    "writer",
]
USERS, ITEMS, EVENTS = 60, 80, 2_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The three files."""

    inter: str
    item: str
    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A ranker fitted to the small data set, and how far it had come each time it said so."""

    model: Ranker
    progress: list[float]


@pytest.fixture(scope="session")
def texts() -> Texts:
    """Users like items of the genre that their number stands for, and everybody likes items with a low number."""
    random = np.random.default_rng(0)
    users = [f"{u}\t{18 + u}\t{'MF'[u % 2]}\t{OCCUPATIONS[u % len(OCCUPATIONS)]}\t00000" for u in range(1, USERS + 1)]
    items = [f"{i}\tFilm {i}\t{1930 + i if i % 9 else 'unknown'}\t{GENRES[i % 4]} {GENRES[i % len(GENRES)]}" for i in range(1, ITEMS + 1)]
    pairs = random.permutation(USERS * ITEMS)[:EVENTS]
    events = []
    for n, (u, i) in enumerate(zip((pairs // ITEMS + 1).tolist(), (pairs % ITEMS + 1).tolist(), strict=True)):
        likes = (u % 4 == i % 4) * 2 + (i < ITEMS / 3) + random.random() > 1.3
        events.append(f"{u}\t{i}\t{random.integers(4, 6) if likes else random.integers(1, 4)}\t{880_000_000 + (EVENTS - n // 2) * 3_000}")
    return Texts(
        inter="\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *events]) + "\n",
        item="\n".join(["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", *items]) + "\n",
        user="\n".join(["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", *users]) + "\n",
    )


@pytest.fixture(scope="session")
def data(texts: Texts) -> Dataset:
    """The small data set."""
    return data_module.parse(texts.inter, texts.item, texts.user)


@pytest.fixture(scope="session")
def features(data: Dataset) -> Features:
    """Its features."""
    return features_module.compute(data)


@pytest.fixture(scope="session")
def trained(data: Dataset, features: Features) -> Trained:
    """A ranker fitted to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    progress: list[float] = []
    model = train.train(data, features, progress.append)
    torch.set_num_threads(threads)
    return Trained(model=model, progress=progress)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums come out the same, and whatever the floor sets is undone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
