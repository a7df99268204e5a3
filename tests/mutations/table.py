"""All mutations. The text of an entry must occur once in its file, which a test checks; where code moves, the entry moves with it."""

from __future__ import annotations

from tests.mutations import attacks, measures, sampling, variational, warmup

MUTATIONS = [*attacks.MUTATIONS, *measures.MUTATIONS, *variational.MUTATIONS, *sampling.MUTATIONS, *warmup.MUTATIONS]
