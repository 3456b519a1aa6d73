"""Build a small byte-pair tokenizer in CLIP's format from the captions."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from training.captions import Facts, caption
from training.styles import STYLES

MERGES = 480
GENERAL = (
    "a an the of in on at with and or to from is are as astronaut doctor chef king queen wizard knight "
    "pilot reading running playing sitting standing wearing holding hat glasses suit dress jacket helmet "
    "crown beard cafe forest city beach street library garden night day light snow rain sun moon space "
    "sea mountain red green blue yellow black white golden dark bright oil painting drawing portrait "
    "photo photograph realistic illustration poster statue style detailed beautiful happy sad angry "
    "surprised calm his her their"
)
"""Words of user prompts that are not in the captions, added as single tokens."""


def byte_letters() -> list[str]:
    """Return one printable character per byte, in the order of CLIP's vocabulary."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + place) for place, _ in enumerate(hidden)]


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """Return merges in order of frequency; ties are resolved alphabetically."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in spelled.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            spelled[word] = joined
    return merges


def build(all_facts: list[Facts], seed: int) -> CLIPTokenizer:
    """Return a tokenizer for the captions of portraits; special tokens have the highest ids, as in CLIP."""
    generator = random.Random(seed)
    styles = ["photo", *STYLES]
    words: Counter[str] = Counter()
    for fact in all_facts:
        for style in styles:
            words.update(re.findall(r"[a-z]+", caption(fact, style, generator)))
    for word in GENERAL.split():
        words[word] += 1
    letters = byte_letters()
    merges = learn_merges(words, MERGES)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    # Duplicate tokens would leave a gap in the ids.
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
