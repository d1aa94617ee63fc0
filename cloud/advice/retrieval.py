"""Finding sections of the manual for a query: by words (BM25), and by meaning where the sentence model is there.

Words: BM25 (Robertson & Zaragoza 2009) by bm25s over everything a section says, divided by the most that the query's
words could score, so that a score means the same for a short query and a long one. Meaning: the cosine of the query to
a section's title and symptoms, averaged with that of its nearest single line. Fused: cosine + `WORD_WEIGHT` · words.
Weights, and the floors below which a section is no answer, were chosen on one half of the probe in
`tests/files/advice_probe.json` and measured on the other (docs/adr/0080, 0082). Pure after loading: no file, no clock.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import bm25s
import numpy as np
import numpy.typing as npt
from bm25s.stopwords import STOPWORDS_EN

from cloud.advice.embedding import Embedder
from cloud.advice.manual import Manual, Section

Method = Literal["hybrid", "bm25"]
WORD_WEIGHT = 0.4  # the middle of a plateau from 0.2 to 0.6
FOREIGN_WEIGHT = 0.5  # of the cosine to the nearest topic that the manual does not cover
FLOOR: dict[Method, float] = {"hybrid": 0.25, "bm25": 0.15}
TITLE_WEIGHT = 2  # a title's words count so often
MAX_QUERY_CHARS = 2_000  # an alert's evidence gives some 600
Scores = npt.NDArray[np.float32]

# What asks, not what is asked for; bm25s's own list has the articles and prepositions.
_STOP = frozenset(STOPWORDS_EN) | {
    "how", "what", "when", "where", "which", "who", "why", "do", "does", "did", "i", "my", "me", "you", "your", "can",
    "could", "may", "must", "have", "has", "had", "he", "she", "we", "they", "them", "am", "get", "got", "go", "should",
    "would",
}  # fmt: skip
_PIECES = re.compile(r"[A-Za-z0-9_.]+|Ω")
_WORDS = re.compile(r"[a-z0-9]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NUMBER = re.compile(r"[\d.]+")


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched for: words as a person would say them, and exact names (signals, features, rules)."""

    text: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hit:
    """A section with its score; `words` and `meaning` are the two parts, `meaning` None without the model."""

    section: Section
    score: float
    words: float
    meaning: float | None


@dataclass(frozen=True, slots=True)
class Found:
    """All sections of a search, best first. `relevance` decides against `floor` whether any of them is an answer."""

    method: Method
    hits: tuple[Hit, ...]
    relevance: float
    floor: float
    nearest_not_covered: str | None

    @property
    def answers(self) -> bool:
        """Whether the best section is about the query at all."""
        return self.relevance >= self.floor


def tokens(text: str) -> list[str]:
    """Cut a text into stems. A name such as `inlet_rise_c` or `Vehicle.Speed` gives itself and its parts."""
    found: list[str] = []
    for piece in _PIECES.findall(text):
        name = piece.strip(".")
        if ("_" in name or "." in name) and not _NUMBER.fullmatch(name):
            found.append(name.lower())
        words = _WORDS.findall(_CAMEL.sub(" ", name).lower())
        found += [_stem(word) for word in words if word not in _STOP and (len(word) > 1 or word.isdigit())]
    return found


def _stem(word: str) -> str:
    """Harman's S-stemmer (1991), then -ing and -ed: endings that change no meaning here."""
    if len(word) > 4:
        if word.endswith("ies") and not word.endswith(("eies", "aies")):
            word = word[:-3] + "y"
        elif word.endswith("s") and not word.endswith(("us", "ss", "aes", "ees", "oes")):
            word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word.rstrip("e") if len(word) > 5 else word


class Index:
    """One manual, ready to be searched; thread-safe. Without `embedder` by words alone."""

    def __init__(self, manual: Manual, embedder: Embedder | None = None) -> None:
        self.manual = manual
        self.method: Method = "bm25" if embedder is None else "hybrid"
        self._embedder = embedder
        documents = [tokens(_everything(section)) for section in manual.sections]
        self._bm25 = bm25s.BM25()
        self._bm25.index(documents, show_progress=False)
        self._known: Collection[str] = self._bm25.vocab_dict
        # the inverse document frequency that bm25s's "lucene" method uses; a word the manual lacks counts as the rarest
        holding = Counter(word for document in documents for word in set(document))
        self._rarest = _idf(len(documents), 0)
        self._idf = {word: _idf(len(documents), count) for word, count in holding.items()}
        if embedder is not None:
            lines = [(i, line) for i, s in enumerate(manual.sections) for line in (s.title, *s.symptoms, *s.steps)]
            self._owner = np.array([i for i, _ in lines])
            summaries = [f"{s.title}. {'; '.join(s.symptoms)}" for s in manual.sections]
            vectors = embedder.remembered([*(line for _, line in lines), *summaries, *manual.not_covered])
            self._lines, self._summaries, self._foreign = np.split(vectors, [len(lines), len(lines) + len(summaries)])

    def search(self, query: Query) -> Found:
        """Score every section of the manual; ties keep the manual's order."""
        text = query.text[:MAX_QUERY_CHARS]
        words = self._by_words(tokens(" ".join((text, *query.names))))
        meaning, foreign, topic = self._by_meaning(text)
        scores = words if meaning is None else meaning + WORD_WEIGHT * words
        order = np.argsort(-scores, kind="stable").tolist()
        hits = tuple(
            Hit(self.manual.sections[i], float(scores[i]), float(words[i]),
                None if meaning is None else float(meaning[i]))
            for i in order
        )  # fmt: skip
        relevance = hits[0].score - FOREIGN_WEIGHT * foreign
        return Found(self.method, hits, relevance, FLOOR[self.method], topic)

    def _by_words(self, asked: Sequence[str]) -> Scores:
        known = [word for word in asked if word in self._known]
        if not known:
            return np.zeros(len(self.manual.sections), np.float32)
        most = sum(self._idf.get(word, self._rarest) for word in asked)
        scores: Scores = self._bm25.get_scores(known) / np.float32(most)
        return scores

    def _by_meaning(self, text: str) -> tuple[Scores | None, float, str | None]:
        """Return the cosine of each section, that of the nearest topic not covered (0 for none), and the topic."""
        if self._embedder is None:
            return None, 0.0, None
        asked = self._embedder.encode([text])[0]
        nearest = np.full(len(self.manual.sections), -1.0, np.float32)
        np.maximum.at(nearest, self._owner, self._lines @ asked)
        meaning: Scores = (nearest + self._summaries @ asked) / 2
        if not self.manual.not_covered:
            return meaning, 0.0, None
        foreign = self._foreign @ asked
        return meaning, max(0.0, float(foreign.max())), self.manual.not_covered[int(foreign.argmax())]


def _everything(section: Section) -> str:
    return " ".join(
        [*[section.title] * TITLE_WEIGHT, *section.symptoms, *section.signals, *section.steps, *section.tools,
         section.stop]
    )  # fmt: skip


def _idf(documents: int, holding: int) -> float:
    return float(np.log(1 + (documents - holding + 0.5) / (holding + 0.5)))
