"""A small tokenizer.json with the parts of Gemma's: the tests that use it need no download."""

import json

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]",
           *(f"<unused{number}>" for number in range(99)), "<start_of_turn>", "<end_of_turn>"]
TAGS = ["table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td",
        "h1", "h2", "h3", "h4", "h5", "h6", "blockquote",
        "strong", "em", "b", "i", "u", "s", "sub", "sup", "code"]
WORDS = """▁the ▁to ▁of ▁and ▁a ▁in ▁is ▁that ▁you ▁for ▁it ▁how ▁can ▁what ▁not ▁with ▁are
 ▁this ▁be ▁your ▁on ▁have ▁do ▁as ▁or ▁if ▁people ▁make ▁help ▁would ▁should ▁about ▁want
 user model Human Assistant Yes No How What ing tion er ed ly ▁Yes ▁No start turn end bos <0
 start_of_ _of_""".split()


def gemma_like_spec(registered=False) -> dict:
    """The parsed tokenizer.json: byte fallback, ▁ for spaces, ids of control tokens as in Gemma's.

    Two kinds of it are published. One registers only <pad>, <eos>, <bos> and <unk>, and the other
    control tokens are plain words of its vocabulary. In the other (`registered`) all of them are
    registered, and so are white space and HTML tags, which are text.
    """
    newlines = ["\n" * count for count in range(1, 32)]                              # 108 to 138
    spaces = ["▁" * count for count in range(2, 32)]                                 # 139 to 168
    tags = [f"<{slash}{tag}>" for slash in ("", "/") for tag in TAGS]                # 169 to 216
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]                              # 217 to 472
    late = ["[toxicity=0]", "\t", "\t\t", "<start_of_image>"]                        # 473 to 476
    letters = ["▁", *map(chr, range(33, 127)), *"éöüßжñ’“”…"]
    vocab, merges = {}, []

    def add(piece):
        return vocab.setdefault(piece, len(vocab))

    for piece in CONTROL + newlines + spaces + tags + bytes_ + late + letters:
        add(piece)

    # A run or a word is built from the left, a letter at a time.
    for piece in newlines + spaces + ["\t\t"] + WORDS:
        for end in range(2, len(piece) + 1):
            add(piece[:end])
            if (merge := f"{piece[:end - 1]} {piece[end - 1]}") not in merges:
                merges.append(merge)

    plain = newlines + spaces + tags + ["\t\t"]
    names = CONTROL + late[:1] + late[-1:] + plain if registered else CONTROL[:4]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {*CONTROL[:4], "<start_of_turn>", "<end_of_turn>"}
    added = [{"id": vocab[name], "content": name, **flags, "special": name in special}
             for name in sorted(names, key=vocab.get)]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    restore = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": replace, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence",
                    "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": True, "vocab": vocab, "merges": merges}}


def gemma_like_tokenizer(path, registered=False):
    """Write the tokenizer.json to `path`. Returns `path`."""
    path.write_text(json.dumps(gemma_like_spec(registered), ensure_ascii=False), encoding="utf-8")
    return path
