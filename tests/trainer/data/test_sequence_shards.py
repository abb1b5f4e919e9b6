"""Context parallelism without ranks: the chunks cover a sequence, and each query sees what it should."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftd.trainer.data.sequence_shards import cut_segments, spans


@given(st.integers(1, 5), st.integers(1, 7))
def test_the_ranks_cover_a_sequence_and_share_its_cost(ranks: int, size: int) -> None:
    length = 2 * ranks * size
    shares = [np.concatenate([np.arange(*span) for span in spans(length, r, ranks)]) for r in range(ranks)]
    assert sorted(np.concatenate(shares)) == list(range(length))
    # A token attends to those up to itself.
    assert len({int((share + 1).sum()) for share in shares}) == 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 4))
def test_every_query_sees_its_own_sample_up_to_itself(sizes: list[int], ranks: int) -> None:
    sizes[-1] += -sum(sizes) % (2 * ranks)
    ends = np.cumsum([0, *sizes]).tolist()
    starts = np.repeat(ends[:-1], sizes)
    for rank in range(ranks):
        for start, stop in spans(ends[-1], rank, ranks):
            first, query_ends, key_ends = cut_segments(start, stop, ends)
            assert (query_ends[-1], key_ends[-1]) == (stop - start, stop - first)
            seen = {}
            for queries, keys in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
                # Causal, with the last query at the last key.
                for query in range(*queries):
                    seen[start + query] = (first + keys[0], first + keys[1] - (queries[1] - 1 - query))
            assert seen == {query: (starts[query], query + 1) for query in range(start, stop)}
