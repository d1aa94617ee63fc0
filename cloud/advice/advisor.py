"""What the service holds for advice: the manual and its index, loaded once; safe to ask from several threads.

Raises at loading, never at an answer: `ConfigError` for a manual that cannot be used as it is. A sentence model that
was never built, or is damaged, leaves the search by words alone, and `detail` says so: advice is needed then too.
"""

import logging
from pathlib import Path

from cloud.advice import manual as manuals
from cloud.advice.advise import Advice, Facts, advise, query_of
from cloud.advice.embedding import Embedder
from cloud.advice.retrieval import Index, Query
from edge_agent.contract.errors import ConfigError

log = logging.getLogger(__name__)


class Advisor:
    """A manual ready to be asked."""

    def __init__(self, manual: Path | None = None, embedding: Path | None = None) -> None:
        self.manual = manuals.load(manual)
        embedder, self.detail = _embedder(embedding)
        self._index = Index(self.manual, embedder)
        self.method = self._index.method

    def answer(self, facts: Facts, question: str | None = None) -> Advice:
        """Return advice on an alert, or on a question about it. Some milliseconds of computing: not for an event loop.

        A question of at most `advise.MAX_QUESTION_CHARS`; the caller bounds it.
        """
        query = query_of(facts) if question is None else Query(question)
        return advise(self.manual, facts, self._index.search(query), query, question=question)


def _embedder(folder: Path | None) -> tuple[Embedder | None, str]:
    """Return the sentence model, or None, and how the manual is then searched."""
    try:
        embedder = Embedder.load(folder)
    except ConfigError as error:
        log.error("advice: %s", error)  # noqa: TRY400 - one line is all there is to say
        return None, f"by words alone (BM25): {error}"
    if embedder is None:
        return None, "by words alone (BM25): the sentence model was not built (fleet-cloud advice-model)"
    return embedder, f"by words (BM25) and meaning ({embedder.name})"
