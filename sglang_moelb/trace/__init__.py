"""The trace of a server on disk: one record a pass, from which its passes can be replayed.

A trace is a folder; each rank has files `rank-RRR.NNNNN.trace` in it, a new one whenever the last
has grown to its size. A file is a preamble (magic and version, `frames`), then frames: one header
(`types.Header`), then one frame a pass and one a change of configuration (`codec`). A frame has its
length and two checksums and is written in one go, so a process that is killed leaves at most one
torn frame at the end, which readers drop, and a reader can follow a writer. Payloads are msgpack
under zlib: msgspec is there already, and no other format gives frames that can be appended, torn
and told from damaged ones without a heavier dependency (an Arrow stream needs pyarrow, 40 MB).
"""
