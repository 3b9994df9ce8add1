"""A registered model answers here, in a process of its own, with the code that it was logged with.

`models.selection.verify` runs this file by its path: a process that has imported this repository's `models`
would answer with today's code in place of the version's own. A question comes on standard input
and its answer goes to standard output, each as its length (8 bytes, big-endian) and an Arrow
stream; arguments are the model's URI and how many threads it may use.
"""

from __future__ import annotations

import gc
import json
import os
import struct
import sys
from typing import Any, BinaryIO

import pyarrow as pa

PARAMS, ERROR = b"params", b"error"  # metadata of a question, of an answer


def answer(model: Any, question: pa.Table) -> pa.Table:
    """What `predict` says: `user_id`, and `items` list<struct<item_id, score>>.

    The columns and parameters that the version does not know are left out. What it refuses is
    in the metadata (`error`).
    """
    import pandas as pd

    # (A whole number of 64 bits beside a null would be rounded to a float.)
    kinds = {pa.int64(): pd.Int64Dtype()}
    given = json.loads((question.schema.metadata or {}).get(PARAMS, b"{}"))
    signature = model.metadata.signature
    if signature is not None and signature.inputs is not None:
        known = set(signature.inputs.input_names())
        question = question.select([n for n in question.column_names if n in known])
        named = {param.name for param in signature.params or ()}
        given = {name: value for name, value in given.items() if name in named}
    try:
        told = model.predict(question.to_pandas(types_mapper=kinds.get), params=given)
    except Exception as error:  # (whatever it is: the caller counts it)
        text = f"{type(error).__name__}: {error}"[:2000]
        empty = pa.schema([("user_id", pa.string())], metadata={ERROR: text.encode()})
        return empty.empty_table()
    lists = told["items"].tolist()
    item = pa.array([one["item_id"] for items in lists for one in items], pa.string())
    score = pa.array([one["score"] for items in lists for one in items], pa.float64())
    offsets = [0]
    for items in lists:
        offsets.append(offsets[-1] + len(items))
    pair = pa.StructArray.from_arrays([item.dictionary_encode(), score], ["item_id", "score"])
    found = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pair)
    return pa.table({"user_id": pa.array(told["user_id"].tolist(), pa.string()), "items": found})


def send(stream: BinaryIO, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body = sink.getvalue()
    stream.write(struct.pack(">Q", body.size))
    stream.write(body)
    stream.flush()


def receive(stream: BinaryIO) -> pa.Table | None:
    """None: the other side has ended."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack(">Q", head)
    body = stream.read(size)
    if len(body) < size:
        return None
    return pa.ipc.open_stream(body).read_all()


def main() -> None:
    uri, threads = sys.argv[1], int(sys.argv[2])
    # Standard output is for answers alone: whatever else is printed goes to standard error.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import logging

    import mlflow.pyfunc
    import torch

    torch.set_num_threads(threads)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    model = mlflow.pyfunc.load_model(uri)
    gc.disable()  # an answer has millions of small objects and no cycles: a third of the time
    while (question := receive(sys.stdin.buffer)) is not None:
        send(out, answer(model, question))


if __name__ == "__main__":
    main()
