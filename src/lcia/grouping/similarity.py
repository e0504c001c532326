"""How alike two instructions are: several answers behind one interface.

A similarity is an index: saved instructions are added once, and a new one is then compared with all of them.
Adding never looks again at what is already there.

Shapes: N saved instructions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer

from lcia.grouping.sentence import encode

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
Analyzer = Callable[[str], list[str]]

# Smooth idf in a corpus of two texts, ln((1 + 2) / (1 + df)) + 1, of a term of one; a term of both has 1.
LONE_IDF = math.log(1.5) + 1.0
# Rows are computed in pieces of this many texts: 64 KiB of floats stay in the cache, more is fetched anew.
BLOCK = 8192


class Similarity(ABC):
    """An index of saved instructions that scores new ones against all of them."""

    @abstractmethod
    def add(self, texts: Sequence[str]) -> None:
        """Append instructions to the index; the saved ones are not touched."""

    @abstractmethod
    def rows(self, texts: Sequence[str]) -> Iterator[Floats]:
        """For each text its similarity to every saved instruction, (N,), in the order of adding."""

    @abstractmethod
    def words(self, text: str, saved: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        """What each term of `text` adds to Σ weight · similarity(text, saved)."""


def words_of(stop_words: str | None = "english") -> Analyzer:
    """scikit-learn's default analysis: lower case, words of two letters or more, no English stop words."""
    return CountVectorizer(stop_words=stop_words).build_analyzer()


def character_ngrams(shortest: int = 2, longest: int = 4) -> Analyzer:
    """Pieces of `shortest` to `longest` characters inside words, in any script."""
    return CountVectorizer(analyzer="char_wb", ngram_range=(shortest, longest)).build_analyzer()


class Postings:
    """An inverted index: for each term the texts that hold it.

    The columns are `array.array`s: they grow in amortised constant time, and numpy reads them without a copy.
    """

    def __init__(self) -> None:
        self._texts: dict[str, array[int]] = {}  # term -> numbers of the texts that hold it, ascending
        self._repeats: dict[str, tuple[array[int], array[int]]] = {}  # term -> texts that repeat it, counts
        self._squares = array("q")  # (N,) Σ count² over a text's terms
        self.largest_square = 1
        self._termless: dict[str, list[int]] = {}  # stripped text -> its numbers, for texts without any term

    def __len__(self) -> int:
        return len(self._squares)

    @property
    def terms(self) -> Iterable[str]:
        return self._texts

    @property
    def squares(self) -> NDArray[np.int64]:
        return np.frombuffer(self._squares, np.int64)

    def add(self, text: str, counts: Mapping[str, int]) -> None:
        number = len(self)
        for term, count in counts.items():
            self._texts.setdefault(term, array("q")).append(number)
            if count > 1:
                texts, repeats = self._repeats.setdefault(term, (array("q"), array("q")))
                texts.append(number)
                repeats.append(count)
        if not counts:
            self._termless.setdefault(text.strip(), []).append(number)
        # Never 0, so that a norm can be divided by; nothing is ever shared with a text without terms.
        square = max(1, _squares(counts))
        self._squares.append(square)
        self.largest_square = max(self.largest_square, square)

    def texts(self, term: str) -> NDArray[np.int64]:
        """The texts that hold a term; each once."""
        return np.frombuffer(self._texts.get(term, b""), np.int64)

    def repeats(self, term: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The texts that hold a term more than once, and how often: few, so they only correct `texts`."""
        texts, counts = self._repeats.get(term, (b"", b""))
        return np.frombuffer(texts, np.int64), np.frombuffer(counts, np.int64)

    def same_termless(self, text: str) -> Floats:
        """(N,): 1 where the saved text has no term and is this one, apart from surrounding space; else 0."""
        row = np.zeros(len(self))
        row[self._termless.get(text.strip(), [])] = 1.0
        return row


@final
class PairTfidf(Similarity):
    """Cosine of TF-IDF vectors fitted on the two texts alone (released code of arXiv 2410.10868, App. H).

    With two texts a, b of term counts a_t, b_t the smooth idf is 1 for a shared term, else c = ln 1.5 + 1:

        cos = Σ_shared a_t b_t / (‖a‖ ‖b‖),    ‖a‖² = Σ_shared a_t² + c² Σ_other a_t²

    so one pass over the postings of a's terms compares it with every saved text. It equals scikit-learn's
    `TfidfVectorizer` fitted on each pair. Where that raises "empty vocabulary" (neither text has a term:
    empty, one character, stop words only) identical texts, apart from surrounding space, have 1 and others 0.
    """

    def __init__(self, analyzer: Analyzer) -> None:
        self.analyzer = analyzer
        self.postings = Postings()

    def add(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.postings.add(text, Counter(self.analyzer(text)))

    def rows(self, texts: Sequence[str]) -> Iterator[Floats]:
        return map(self._row, texts)

    def _row(self, text: str) -> Floats:
        counts = Counter(self.analyzer(text))
        if not counts:
            return self.postings.same_termless(text)
        dot, here, there = self._shared(counts)
        squares, own, row = self.postings.squares, _squares(counts), np.empty(len(self.postings))
        for start in range(0, len(row), BLOCK):
            part = slice(start, start + BLOCK)
            norms = _square_norms(here[part], own) * _square_norms(there[part], squares[part])
            np.divide(dot[part], np.sqrt(norms), out=row[part])
        return row

    def _shared(self, counts: Mapping[str, int]) -> tuple[Ints, Ints, Ints]:
        """Σ a_t b_t, Σ a_t² and Σ b_t² over the terms shared with each saved text, (N,) each."""
        # No sum exceeds the larger ‖·‖² of a pair. The smallest type that holds it stays in the cache.
        largest = max(_squares(counts), self.postings.largest_square)
        dot = np.zeros(len(self.postings), np.min_scalar_type(largest))
        for term in counts:
            dot[self.postings.texts(term)] += 1  # as if no term were repeated
        again = [term for term, count in counts.items() if count > 1]
        repeated = [term for term in counts if len(self.postings.repeats(term)[0])]
        here = dot.copy() if again or repeated else dot
        there = dot.copy() if again or repeated else dot
        for term in again:
            texts, count = self.postings.texts(term), counts[term]
            dot[texts] += count - 1
            here[texts] += count * count - 1
        for term in repeated:
            texts, repeats = self.postings.repeats(term)
            dot[texts] += (counts[term] * (repeats - 1)).astype(dot.dtype)
            there[texts] += (repeats * repeats - 1).astype(dot.dtype)
        return dot, here, there

    def words(self, text: str, saved: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        here, added = Counter(self.analyzer(text)), defaultdict[str, float](float)
        for other, weight in zip(saved, weights, strict=True):
            there = Counter(self.analyzer(other))
            idf = {term: 1.0 if term in here and term in there else LONE_IDF for term in here | there}
            _add_cosine(added, here, there, idf, weight)
        return dict(added)


@final
class CodebookTfidf(Similarity):
    """Cosine of TF-IDF vectors fitted on all N saved instructions and the new one: scikit-learn's smooth idf

        idf_t = ln((1 + N + 1) / (1 + df_t)) + 1,    df_t = how many of the N + 1 hold t

    Texts without terms are treated as in PairTfidf.
    """

    def __init__(self, analyzer: Analyzer) -> None:
        self.analyzer = analyzer
        self.postings = Postings()
        self._norms: Floats = np.empty(0)  # (N,) ‖b‖² with a new text that shares no term; of the N it was made for

    def add(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.postings.add(text, Counter(self.analyzer(text)))

    def rows(self, texts: Sequence[str]) -> Iterator[Floats]:
        return map(self._row, texts)

    def _row(self, text: str) -> Floats:
        counts = Counter(self.analyzer(text))
        if not counts:
            return self.postings.same_termless(text)
        dot, norms = np.zeros(len(self.postings)), self._norms_without_new()
        here = 0.0
        for term, count in counts.items():
            with_new, without = self._idf(term, new=True) ** 2, self._idf(term, new=False) ** 2
            texts, (again, repeats) = self.postings.texts(term), self.postings.repeats(term)
            dot[texts] += count * with_new
            dot[again] += count * with_new * (repeats - 1)
            norms[texts] += with_new - without
            norms[again] += (with_new - without) * (repeats * repeats - 1)
            here += count * count * with_new
        return np.round(dot / np.sqrt(norms * here), 15)  # 1 exactly for identical texts

    def _idf(self, term: str, new: bool) -> float:
        held = len(self.postings.texts(term)) + new
        return math.log((2 + len(self.postings)) / (1 + held)) + 1.0

    def _norms_without_new(self) -> Floats:
        """Adding changes every idf, and so every norm: they are summed again, once, before the next match."""
        if len(self._norms) != len(self.postings):
            norms = np.zeros(len(self.postings))
            for term in self.postings.terms:
                squared = self._idf(term, new=False) ** 2
                again, repeats = self.postings.repeats(term)
                norms[self.postings.texts(term)] += squared
                norms[again] += squared * (repeats * repeats - 1)
            self._norms = np.where(norms > 0, norms, 1.0)
        return self._norms.copy()

    def words(self, text: str, saved: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        here, added = Counter(self.analyzer(text)), defaultdict[str, float](float)
        for other, weight in zip(saved, weights, strict=True):
            there = Counter(self.analyzer(other))
            idf = {term: self._idf(term, new=term in here) for term in here | there}
            _add_cosine(added, here, there, idf, weight)
        return dict(added)


@final
class Sentence(Similarity):
    """Cosine of sentence vectors of all-MiniLM-L6-v2: meaning beyond words. Needs the extra `sentence`.

    Rounded to 6 decimals, the precision of the encoder. Space around an instruction and a full stop at its end
    are left out: to the encoder a full stop weighs as much as a word.
    """

    def __init__(self) -> None:
        self._vectors: list[NDArray[np.float32]] = []
        self._matrix: NDArray[np.float32] = np.empty((0, 0), np.float32)  # (N, D) once asked for

    def add(self, texts: Sequence[str]) -> None:
        self._vectors += [_vector(text) for text in texts]

    def rows(self, texts: Sequence[str]) -> Iterator[Floats]:
        if len(self._matrix) != len(self._vectors):
            self._matrix = np.stack(self._vectors)
        for text in texts:
            yield np.round(self._matrix @ _vector(text), 6, out=np.empty(len(self._matrix)))

    def words(self, text: str, saved: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
        """What the sum loses when a word is left out: a vector of a sentence has no share for each word."""
        target = np.array(weights) @ np.stack([_vector(other) for other in saved])  # (D,)
        words = text.split()
        added = defaultdict[str, float](float)
        for place, word in enumerate(words):
            rest = " ".join(words[:place] + words[place + 1 :])
            added[word.lower().strip(".,;:!?()\"'")] += float((_vector(text) - _vector(rest)) @ target)
        return dict(added)


def _vector(text: str) -> NDArray[np.float32]:
    return encode(text.strip().rstrip(".。").rstrip())


def _square_norms(shared: Ints, squares: int | Ints) -> Floats:
    """‖a‖² of the closed form, in the way that gives identical texts a cosine of exactly 1."""
    return shared + LONE_IDF**2 * (squares - shared)


def _squares(counts: Mapping[str, int]) -> int:
    return sum(count * count for count in counts.values())


def _add_cosine(
    added: dict[str, float],
    here: Mapping[str, int],
    there: Mapping[str, int],
    idf: Mapping[str, float],
    weight: float,
) -> None:
    """Add weight · a_t b_t idf_t² / (‖a‖ ‖b‖) for each shared term t."""
    norms = math.prod(sum((count * idf[term]) ** 2 for term, count in text.items()) for text in (here, there))
    for term in here.keys() & there.keys():
        added[term] += weight * here[term] * there[term] * idf[term] ** 2 / math.sqrt(norms)


SIMILARITIES: dict[str, Callable[[], Similarity]] = {
    "tfidf_pair": lambda: PairTfidf(words_of()),
    "tfidf_codebook": lambda: CodebookTfidf(words_of()),
    "char_ngram": lambda: PairTfidf(character_ngrams()),
    "sentence": Sentence,
}
"""Every similarity by the name it has in a configuration."""
