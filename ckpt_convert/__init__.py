"""Generators of others' into ours, and ours into theirs: `python -m ckpt_convert --help`.

`formats` reads files, without the libraries that wrote them and without running what they carry, and gives named
arrays. `stylegan2` knows what the same parameter is called where, and how it lies there. `convert` joins the two.
"""
