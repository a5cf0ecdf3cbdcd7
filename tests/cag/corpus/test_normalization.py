import re
import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from cag.corpus.normalization import normalize_text, one_line

# Characters that the rules are about, mixed with any others.
tricky = st.text(
    st.one_of(
        st.sampled_from("\r\n\t \x00\x0b\x0c\x1f\x7f\x85\u00a0\u00ad\u200b\u2028\u2029\ufeff\u0301e\u212b\ud800#-"),
        st.characters(),
    ),
    max_size=60,
)


@given(tricky)
@example("e\u200b\u0301")
@example("\n\x00\n\x00\n\x00\n\n")
@example(" \u2000\n")
def test_normal_form_is_reached_in_one_step_and_holds_its_promises(text):
    normal = normalize_text(text)
    assert normalize_text(normal) == normal
    assert normal == unicodedata.normalize("NFC", normal)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00a0\u00ad\u200b\u2028\u2029\ufeff\ud800-\udfff]", normal)
    assert not re.search(r"[ \t]+$|\A\n|\n\Z|\n{4}", normal, re.MULTILINE) or not normal.strip()
    normal.encode("utf-8")


@given(st.text(st.characters(whitelist_categories=("L", "N", "P", "Zs"), blacklist_characters="\u00ad"), max_size=60))
def test_no_visible_character_is_lost(text):
    visible = "".join(unicodedata.normalize("NFC", text).split())
    assert "".join(normalize_text(text).split()) == visible


def test_equal_texts_from_different_editors_become_equal():
    unix = "Caf\u00e9\n  indented\n\n\nend"
    windows = "\ufeffCafe\u0301  \r\n  indented\t\r\n\r\n\r\n\r\n\r\nend\r\n\r\n"
    assert normalize_text(windows) == unix == normalize_text(unix)


def test_leading_spaces_and_tabs_stay():
    assert normalize_text("    code\n\tmore\n") == "    code\n\tmore"


def test_compatibility_forms_stay():
    assert normalize_text("x\u00b2 \uff21") == "x\u00b2 \uff21"


@given(st.text(st.sampled_from("e\u0301\u0316\u0344\u0f73\u1e09\u2014 "), max_size=300))
@example("e" + "\u0344" * 40)
@example("\u1e09" + "\u0301\u0316" * 40)
def test_marks_are_composed_few_at_a_time(text):
    normal = normalize_text(text)
    assert normalize_text(normal) == normal == unicodedata.normalize("NFC", normal)
    runs = re.findall("[\u0301\u0316\u0308\u0327\u0f71\u0f72]+", unicodedata.normalize("NFD", normal))
    assert max(map(len, runs), default=0) <= 33  # a letter may bring three of its own
    assert max(map(len, re.split("[e\u1e09\u2014 \n]", text))) > 10 or "\u034f" not in normal


def test_a_document_of_marks_is_read_at_once():
    marks = "\u0301\u0316" * 50_000  # composed as one run, these take most of a minute
    assert normalize_text("a" + marks).count("\u0316") == 50_000


def test_one_line():
    assert one_line(" a\r\n b\u00a0c ") == "a b c"
