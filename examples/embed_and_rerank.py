"""Search a few documents: by the distance of embeddings, then by a reranker that reads query and document together.

python examples/embed_and_rerank.py                       # downloads both models, 1.2 GB each
python examples/embed_and_rerank.py --embedder FOLDER --reranker FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qwen3fast import Embedder, Reranker

DOCUMENTS = [
    "A KV cache keeps the keys and values of earlier tokens, so a new token costs one pass over one token.",
    "The fox hid the key in the garden behind the old school.",
    "Quantized weights take fewer bytes, and reading weights is what a decode step spends its time on.",
]
QUERY = "Why does a cache make text generation faster?"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", default="Qwen/Qwen3-Embedding-0.6B")
    parser.add_argument("--reranker", default="Qwen/Qwen3-Reranker-0.6B")
    args = parser.parse_args(argv)

    # Queries get an instruction, documents none. Vectors have length 1, so a dot product is a cosine.
    embedder = Embedder.from_pretrained(args.embedder)
    documents_NE = embedder.encode(DOCUMENTS)
    query_1E = embedder.encode(QUERY, instruction="Given a question, retrieve passages that answer it")
    similarity_N = (query_1E @ documents_NE.T)[0]
    print(f"{QUERY}\n\nby embedding:")
    for i in similarity_N.argsort(descending=True).tolist():
        print(f"  {similarity_N[i]:.3f}  {DOCUMENTS[i]}")

    # A reranker is slower and better: one forward pass per document. Use it on the best few of the embeddings.
    best = similarity_N.topk(2).indices.tolist()
    scores = Reranker.from_pretrained(args.reranker).score(QUERY, [DOCUMENTS[i] for i in best])
    print("\nthe best two, reranked:")
    for score, i in sorted(zip(scores, best, strict=True), reverse=True):
        print(f"  {score:.3f}  {DOCUMENTS[i]}")


if __name__ == "__main__":
    main()
