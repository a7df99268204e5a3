"""All mutations. The text of an entry must occur once in its file, which a test checks; where code moves, the entry moves with it."""

from __future__ import annotations

from tests.mutations import attacks, measures, reading, sampling, storage, variational, warmup

MUTATIONS = [mutation for table in (attacks, measures, reading, sampling, storage, variational, warmup) for mutation in table.MUTATIONS]
