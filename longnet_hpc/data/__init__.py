"""From text to a corpus file, and from a corpus file to this rank's slice of every sequence."""

from longnet_hpc.data.corpus import Corpus
from longnet_hpc.data.prepare import prepare
from longnet_hpc.data.reader import SequenceReader, sequence_count
from longnet_hpc.data.sources import default_sources
from longnet_hpc.data.tokenizer import load_tokenizer

__all__ = ["Corpus", "SequenceReader", "default_sources", "load_tokenizer", "prepare", "sequence_count"]
