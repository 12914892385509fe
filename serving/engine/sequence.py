"""One request as the scheduler sees it: tokens, how far they are computed, and in which pages."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.engine.pages import next_key


@dataclass(eq=False)
class Sequence:
    """A request's tokens: the prompt and what was generated. Of an encoder-decoder, what its
    decoder reads and generates; the prompt is the encoder's `source`.

    Attributes:
        source: The token ids that an encoder reads.
        source_tokens: Of `prefix_tokens`, the first so many are for what the decoder has of them,
            and of the adapter's vectors in front of them.
        adapter: Groups the rows of a step; with `tenant`, what requests are fair to each other by.
        prefix_tokens: Positions in front of the tokens that belong to the adapter or the source.
            They fill the first `prefix_pages`, which all requests of one `prefix_key` share.
        prefix_key: What the prefix is.
        root: What tokens' pages are shared by: same root, same keys and values. None: not at all.
        scored_tokens: Logits are wanted behind each of so many first tokens, not only behind the
            last, so these are computed and not taken from other requests' pages.
        pooled_from: Hidden states are wanted behind the tokens from this one on, which are computed
            too, and nothing is sampled. None: no hidden states.
        pages: Used by this sequence: the prefix's, then its own.
        num_computed: Tokens (the prefix apart) whose keys and values lie in the pages.
        has_prefix: Whether the prefix lies in its pages.
    """

    id: str
    tokens: list[int]
    adapter: str = ""
    tenant: str = ""
    prefix_tokens: int = 0
    prefix_key: bytes = b""
    root: bytes | None = None
    scored_tokens: int = 0
    pooled_from: int | None = None
    source: tuple[int, ...] = ()
    source_tokens: int = 0
    pages: list[int] = field(default_factory=list[int])
    num_computed: int = 0
    has_prefix: bool = False
    preemptions: int = 0
    _keys: list[bytes] = field(default_factory=list[bytes])

    @property
    def first_needed(self) -> int:
        """The first token that is computed whatever others have computed of it."""
        first = len(self.tokens) - 1 if self.pooled_from is None else self.pooled_from
        return 0 if self.scored_tokens else first

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.tokens) - self.num_computed

    @property
    def unread_source(self) -> int:
        """Tokens that an encoder reads before the next step: all or none, since each sees all."""
        return 0 if self.has_prefix else self.source_tokens

    @property
    def is_reading(self) -> bool:
        """Whether it reads its prompt, or has lost what it had computed."""
        return self.num_left > 1 or self.unread_source > 0

    def prefix_pages(self, page_tokens: int) -> int:
        """Pages of the adapter's prefix."""
        return -(-self.prefix_tokens // page_tokens)

    def keys(self, tokens: int, page_tokens: int) -> list[bytes]:
        """What the prefix's pages and the full ones of the first so many tokens hold."""
        prefix = self.prefix_pages(page_tokens)
        if not self._keys:
            self._keys = [next_key(self.prefix_key, [page]) for page in range(prefix)]
        if self.root is None:
            return self._keys
        count = prefix + tokens // page_tokens
        while len(self._keys) < count:
            start = (len(self._keys) - prefix) * page_tokens
            previous = self._keys[-1] if start else self.root
            self._keys.append(next_key(previous, self.tokens[start : start + page_tokens]))
        return self._keys[:count]


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence from its token `start`; the last of them is sampled from if
    nothing is left behind it and an answer is wanted."""

    sequence: Sequence
    start: int
    count: int

    @property
    def cost(self) -> int:
        """Tokens that a step computes for it."""
        return self.count + self.sequence.unread_source

    @property
    def is_last(self) -> bool:
        """Whether the step ends at the sequence's last token."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def is_sampled(self) -> bool:
        """Whether a token is sampled behind it."""
        return self.is_last and self.sequence.pooled_from is None

    @property
    def pooled(self) -> range:
        """The tokens, counted from the chunk's first, whose hidden states are wanted."""
        first = self.sequence.pooled_from
        return range(self.count if first is None else max(0, first - self.start), self.count)

    @property
    def wanted(self) -> range:
        """The tokens, counted from the chunk's first, behind which logits are wanted."""
        scored = min(self.count, self.sequence.scored_tokens - self.start)
        if scored <= 0:
            return range(self.count - self.is_sampled, self.count)
        assert scored == self.count or not self.is_sampled, "prompts alone are scored"
        return range(scored)
