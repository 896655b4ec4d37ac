"""Trains the small SentencePiece model of the tokenizer test and records what the reference library encodes.

Run with `pip install sentencepiece==0.2.3`, then `python make.py` in this folder. The options are those of
PaliGemma's model: BPE, byte fallback, split digits, no normalisation, no dummy prefix, runs of newlines and of
spaces as user-defined symbols.
"""

import io
import json
import random

import sentencepiece

VERBS = "pick up,place,push,pull,open,close,put,move,lift,turn on,slide,stack,reach for,press,wipe,fold,grasp".split(",")
NOUNS = "block,drawer,bowl,mug,plate,button,door,window,handle,cabinet,stove,basket,book,wine bottle,pan,peg,cube".split(",")
KINDS = "red,green,blue,yellow,black,white,small,large,left,right,top,bottom,middle,wooden,nearest".split(",")
JOINS = ["put it on", "place it in", "move it next to", "leave it behind"]
SYMBOLS = ["\n" * n for n in range(1, 4)] + ["\u2581" * n for n in range(2, 5)] + ["<mask>"]
SYMBOLS += [f"<loc{n:04d}>" for n in range(8)]


def sentence(rng: random.Random) -> str:
    text = f"{rng.choice(VERBS)} the {rng.choice(KINDS)} {rng.choice(NOUNS)}"
    if rng.random() < 0.7:
        text += f" and {rng.choice(JOINS)} the {rng.choice(KINDS)} {rng.choice(NOUNS)}"
    if rng.random() < 0.3:
        text = f"Task: {text}, State: {' '.join(str(rng.randrange(-1, 256)) for _ in range(8))}; Action: "
    return text


def texts(rng: random.Random) -> list[str]:
    fixed = ["", "\n", " ", "  ", "pick up the red block", "pick\n\nup", "\n\n\n\n", " leading", "trailing ", "tab\there"]
    fixed += ["a   b    c     d      e", "Pick UP!", "don't", "\u2581", "word\u2581word", "<loc0003> x <mask><loc0007>"]
    fixed += ["<loc", "x<loc0001", "<bos>", "<s>", "ünïcödé 盘子 🤖", "日本"]
    fixed += ["Task: pick up the red block, State: -1 0 0 127 128 192 255 255;\nAction: "]
    alphabet = "abcdefghi  \n redbluPTS:,;-0123456789é\u2581<loc0001>"
    made = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30))) for _ in range(100)]
    return fixed + made + [sentence(rng) for _ in range(100)]


def main() -> None:
    rng = random.Random(7)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(rng) for _ in range(4000)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=SYMBOLS,
        num_threads=1,
        minloglevel=2,
    )
    with open("tokenizer.model", "wb") as file:
        file.write(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    cases = [[text, processor.encode(text, add_bos=True)] for text in texts(rng)]
    with open("cases.json", "w", encoding="utf-8") as file:
        json.dump({"vocab_size": processor.vocab_size(), "cases": cases}, file, ensure_ascii=True, separators=(",", ":"))


if __name__ == "__main__":
    main()
