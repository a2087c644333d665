"""Searching a collection, and naming the classes of things.

base        what an index holds and answers
query       texts, pictures, sounds and items, added up and subtracted, become a vector
engine      hits by modality, near copies folded, scores that can be understood
embed       makes a collection: shards, folders and tables become items with vectors
collection  what a collection's folder holds
segment     the part of it that has been indexed
index       a collection in a folder, searched
postgres    a collection in PostgreSQL with pgvector
memory      a collection in memory: shards that are embedded on the fly
classify    which class each of a user's things is of
"""
