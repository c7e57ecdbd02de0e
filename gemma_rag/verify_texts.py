"""The fixed texts that an encoder is verified with, and how a text with its prompt can be misread.

The texts are ours. A change of any of them makes older reference files useless, which `probes_digest` tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from enum import Enum
from functools import cache
from itertools import count, cycle, islice
from typing import NamedTuple

from gemma_rag.encoders.base import Input
from gemma_rag.prompts import PromptProfile, Task


class Fault(str, Enum):
    """What can be wrong with vectors."""

    FAILED = "failed"
    NOT_NORMALISED = "not_normalised"
    PROMPTS_MISSING = "prompts_missing"
    PROMPTS_DOUBLED = "prompts_doubled"
    WRONG_ROLE = "wrong_role"
    TITLE_LOST = "title_lost"
    TEXTS_CHANGED = "texts_changed"
    DENSE_MISSING = "dense_missing"
    TRUNCATED_EARLY = "truncated_early"
    ANOTHER_MODEL = "another_model"
    LOW_PRECISION = "low_precision"


PROMPTED_AGAIN = "texts that already carry a prompt, prompted again"
"""`Reading.how` of what is right for encoders that are told to prompt every text."""


class Probe(NamedTuple):
    """One text to verify with.

    Attributes:
        text: The text, without any prompt.
        task: What it is embedded for.
        title: The document's title.
        kind: ``sentence``, ``titled``, ``code``, ``emoji``, ``numbers``, ``short``, ``space``, ``lines``, ``prompted`` or
            ``long``.
        language: ISO 639-1 code, ``zh-Hant`` for traditional Chinese; "" where that is not the point.
    """

    text: str
    task: Task
    title: str | None = None
    kind: str = "sentence"
    language: str = ""

    @property
    def input(self) -> Input:
        """What an encoder is given."""
        return Input(self.text, self.task, self.title)

    @property
    def titled(self) -> bool:
        """Whether the title holds more than white space."""
        return bool((self.title or "").strip())


class Reading(NamedTuple):
    """A text as a model must not read it.

    Attributes:
        faults: What is wrong with it.
        how: In words, after "are those of".
        text: What the model reads, the prompt included.
    """

    faults: tuple[Fault, ...]
    how: str
    text: str


def right_text(probe: Probe, profile: PromptProfile) -> str:
    """What the model must read: prompt, title and text; a text that brings its prompt is left as it is."""
    return probe.text if profile.is_prompted(probe.text) else profile.render(probe.text, probe.task, probe.title)


def misreadings(probe: Probe, profile: PromptProfile) -> list[Reading]:
    """How the text can be misread, the likeliest first, each different text once and none that is right."""
    readings = {right_text(probe, profile): None}
    kept = []
    for reading in _misreadings(probe, profile):
        if reading.text not in readings:
            readings[reading.text] = None
            kept.append(reading)
    return kept


def _misreadings(probe: Probe, profile: PromptProfile) -> Iterator[Reading]:
    text, task = probe.text, probe.task
    title = " ".join((probe.title or "").split())
    bare, prompt = profile.prompt(task), profile.prompt(task, probe.title)
    if profile.is_prompted(text):
        yield Reading((Fault.PROMPTS_DOUBLED,), PROMPTED_AGAIN, prompt + text)
        return
    if probe.kind == "lines":
        flat = " ".join(text.splitlines())
        yield Reading((Fault.TEXTS_CHANGED,), "texts whose line breaks became spaces", prompt + flat)
        if bare:
            how = "texts without a prompt whose line breaks became spaces"
            yield Reading((Fault.PROMPTS_MISSING, Fault.TEXTS_CHANGED), how, flat)
        return
    other = {role: profile.prompt(role) for role in (Task.QUERY, Task.DOCUMENT) if role is not task}
    if bare:
        yield Reading((Fault.PROMPTS_MISSING,), "texts without a prompt", text)
        if title:
            yield Reading((Fault.PROMPTS_MISSING,), "title and text without a prompt", f"{title}\n{text}")
            yield Reading((Fault.PROMPTS_MISSING,), "'title: ...' and text without a prompt", f"title: {title}\n\n{text}")
        yield Reading((Fault.PROMPTS_DOUBLED,), "texts with their prompt twice", prompt + prompt + text)
        yield Reading((Fault.PROMPTS_DOUBLED,), "texts with their prompt behind the one without title", bare + prompt + text)
    for role, wrong in other.items():
        if wrong and bare:
            how = f"texts with their prompt behind the {role.value} prompt"
            yield Reading((Fault.PROMPTS_DOUBLED,), how, wrong + prompt + text)
        if wrong != bare:
            yield Reading((Fault.WRONG_ROLE,), f"texts behind the {role.value} prompt", wrong + text)
    if title:
        yield Reading((Fault.TITLE_LOST,), "texts without their title", bare + text)
        if bare:
            yield Reading((Fault.TITLE_LOST,), "texts that hold 'title: ...'", f"{bare}title: {title}\n\n{text}")
            yield Reading((Fault.TITLE_LOST,), "texts whose first line is the title", f"{bare}{title}\n{text}")


@cache
def probes() -> tuple[Probe, ...]:
    """The texts, always the same."""
    made: list[Probe] = []
    for language, (question, statement, *more) in _SENTENCES.items():
        made.append(Probe(question, Task.QUERY, language=language))
        made.append(Probe(statement, Task.DOCUMENT, language=language))
        made += [Probe(text, Task.DOCUMENT, title, "titled", language) for title, text in more]
    for task, texts in _OTHER_TASKS.items():
        made += [Probe(text, task, kind="code" if task is Task.CODE_QUERY else "sentence") for text in texts]
    made += [Probe(text, task, title, kind) for kind, rows in _ODD.items() for task, title, text in rows]
    made += [Probe(_long(size, i), task, title, "long") for i, (size, task, title) in enumerate(_LONG)]
    return tuple(made)


@cache
def probes_digest() -> str:
    """SHA-256 over the texts, in hexadecimal."""
    rows = [[p.text, p.task.value, p.title, p.kind, p.language] for p in probes()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def suspects() -> tuple[int, ...]:
    """Places of the probes whose misreadings are computed too: a few of each group, evenly spaced, no long ones."""
    groups: dict[str, list[int]] = {}
    for i, probe in enumerate(probes()):
        if probe.kind != "long":
            groups.setdefault(group_of(probe), []).append(i)
    return tuple(sorted(i for group in groups.values() for i in group[:: max(1, len(group) // _SUSPECTS)]))


def group_of(probe: Probe) -> str:
    """Probes that a runtime would treat alike: by task, titles apart, and the special kinds apart."""
    if probe.kind in ("lines", "prompted", "long"):
        return f"{probe.task.value} ({probe.kind})"
    return f"{probe.task.value} with title" if probe.titled else probe.task.value


_SUSPECTS = 8
"""Least number of probes of a group whose misreadings are computed, where the group has as many."""


def _long(size: int, place: int) -> str:
    """A text of about `size` tokens: bytes / 5, which is near what Gemma's tokenizer makes of this mixture.

    Each stretch differs from the ones before it, so that a text which is cut has another vector.
    """
    parts: list[str] = []
    length = 0
    for part in _material(place):
        if length >= 5 * size:
            break
        parts.append(part)
        length += len(part.encode()) + 1
    return " ".join(parts)


def _material(place: int) -> Iterator[str]:
    everything = [text for question, statement, *_ in _SENTENCES.values() for text in (statement, question)]
    start = 11 * place
    for turn in count():
        yield from islice(cycle(everything), start, start + 24)
        start += 24
        yield from (f"{turn}.{i}: {7 * i + turn} kg, {i * i % 97}.{i % 10}0 EUR, shelf {chr(65 + i)}{turn};" for i in range(16))
        yield from (f"def step_{turn}_{i}(x):\n    return x * {i + turn} - {i % 5}\n" for i in range(8))


_LONG: tuple[tuple[int, Task, str | None], ...] = (
    (50, Task.DOCUMENT, None),
    (50, Task.QUERY, None),
    (120, Task.DOCUMENT, None),
    (120, Task.DOCUMENT, "The hundred words"),
    (250, Task.DOCUMENT, None),
    (250, Task.QUERY, None),
    (500, Task.DOCUMENT, None),
    (500, Task.DOCUMENT, "仓库清单"),
    (1000, Task.DOCUMENT, None),
    (1000, Task.DOCUMENT, None),
    (2000, Task.DOCUMENT, None),
    (2400, Task.DOCUMENT, None),
    (2400, Task.QUERY, None),
    (4800, Task.DOCUMENT, None),
    (9600, Task.DOCUMENT, None),
)

_OTHER_TASKS: dict[Task, tuple[str, ...]] = {
    Task.CLASSIFICATION: (
        "The parcel came broken and nobody answers the phone.",
        "快递到得很快，包装也很好。",
        "Ich möchte mein Abo zum Monatsende kündigen.",
        "客服態度很差，我不會再來了。",
        "Great value, would buy again!",
    ),
    Task.CLUSTERING: (
        "Rain is expected in the north from noon on.",
        "The central bank left its rate where it was.",
        "昨晚的比赛踢了加时。",
        "Le conseil a voté le budget des écoles.",
        "股市今天小幅上漲。",
    ),
    Task.SIMILARITY: (
        "The cat sleeps on the warm stove.",
        "A kitten is dozing near the oven.",
        "猫在炉子旁边睡觉。",
        "Der Kater schläft auf dem Ofen.",
        "這兩句話的意思差不多。",
    ),
    Task.CODE_QUERY: (
        "sort a list of dictionaries by a key",
        "read a file line by line in Go",
        "如何用 Python 合并两个字典",
        "regular expression for an ISO date",
        "free a linked list in C without recursion",
    ),
    Task.QUESTION_ANSWERING: (
        "Who wrote the letter that was found in the attic?",
        "哪一年开通了第一条地铁？",
        "How many legs does a crab have?",
        "Warum ist das Meer salzig?",
        "誰發明了這種紙？",
    ),
    Task.FACT_CHECKING: (
        "The tower is taller than the cathedral beside it.",
        "一公斤铁比一公斤棉花重。",
        "Bees can see ultraviolet light.",
        "La batalla duró tres días.",
        "月球上的一天等於地球上的一個月。",
    ),
    Task.SUMMARIZATION: (
        "The meeting agreed on a new roof, put off the paint, and left the price of both to a committee of three.",
        "会议决定明年扩建仓库，并把旧设备卖给邻近的工厂。",
        "Nach langem Streit einigten sich die Nachbarn auf eine Hecke statt einer Mauer.",
        "報告指出，用水量在五年內下降了一成，主要因為換了新的水管。",
        "Sales rose in spring, fell in summer, and ended the year where they began.",
    ),
}

_ODD: dict[str, tuple[tuple[Task, str | None, str], ...]] = {
    "titled": (
        (Task.DOCUMENT, "  Opening \t hours\n", "The library opens at nine, on Sundays at noon."),
        (Task.DOCUMENT, "退货说明", "收到货后七天内可以退货，运费由买家承担。"),
        (Task.DOCUMENT, "請假規定", "請假三天以上，必須由部門主管簽名。"),
        (Task.DOCUMENT, "入园　须知", "公园晚上十点关门。"),
        (Task.DOCUMENT, "none", "A page whose title is the word none."),
        (Task.DOCUMENT, "A | text: B", "A title that looks like a prompt."),
        (Task.DOCUMENT, "🚲 Bicycles", "Bicycles travel free in the last carriage."),
        (Task.DOCUMENT, "Minutes of the long autumn meeting of the committee for roads, bridges and ferries", "Nothing new."),
        (Task.DOCUMENT, "7", "Seventh floor: accounts, archive, canteen."),
    ),
    "sentence": (
        (Task.DOCUMENT, "", "An empty title is no title."),
        (Task.DOCUMENT, " \n\t ", "A title of white space is no title."),
    ),
    "code": (
        (Task.DOCUMENT, None, "def area(r):\n    return 3.14159 * r ** 2"),
        (Task.DOCUMENT, "queue.rs", "fn push(&mut self, x: T) { self.items.push_back(x); }"),
        (Task.DOCUMENT, None, "SELECT name, COUNT(*) FROM visits WHERE day >= '2024-01-01' GROUP BY name;"),
        (Task.DOCUMENT, None, '{"id": 17, "tags": ["a", "b"], "ok": true, "next": null}'),
        (Task.QUERY, None, "for (int i = 0; i < n; ++i) sum += a[i];"),
        (Task.QUERY, None, "TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
    ),
    "emoji": (
        (Task.QUERY, None, "🎉🎂 when is the party? 🥳"),
        (Task.DOCUMENT, None, "👩🏽‍🚒 and 👨‍👩‍👧‍👦 live at number 9 🏠"),
        (Task.DOCUMENT, None, "🇯🇵🇧🇷🇰🇪"),
    ),
    "numbers": (
        (Task.QUERY, None, "0.1 + 0.2 = 0.30000000000000004"),
        (Task.QUERY, None, "+49 30 1234567, ext. 89"),
        (Task.DOCUMENT, None, "2024-02-29T23:59:60Z"),
        (Task.DOCUMENT, None, "1,234,567.89 € − 12 % ≈ 1.09 × 10⁶"),
        (Task.DOCUMENT, None, "第３２条 ①②③ Ⅳ ½"),
    ),
    "short": (
        (Task.QUERY, None, "."),
        (Task.QUERY, None, "a"),
        (Task.QUERY, None, "password"),
        (Task.QUERY, None, "好"),
        (Task.DOCUMENT, None, "?!"),
        (Task.DOCUMENT, None, "x"),
        (Task.DOCUMENT, None, "-"),
        (Task.DOCUMENT, None, "茶"),
    ),
    "space": (
        (Task.QUERY, None, "\u3000x"),
        (Task.QUERY, None, "  two spaces before, and after  "),
        (Task.DOCUMENT, None, "tab\tand  double  space"),
        (Task.DOCUMENT, None, "no\u00a0break, zero\u200bwidth, soft\u00adhyphen"),
        (Task.DOCUMENT, None, "A line that ends.\n"),
    ),
    "lines": (
        (Task.QUERY, None, "first line\nsecond line\nthird line?"),
        (Task.QUERY, None, "the parcel:\n- is it here\n- who took it"),
        (Task.DOCUMENT, None, "Dear all,\n\n\nthe lift is out of order.\n\nYours,\nthe caretaker"),
        (Task.DOCUMENT, None, "# Plan\n\n* seeds\n* soil\n* water\n\n```\nmake garden\n```"),
        (Task.DOCUMENT, None, "一行\n二行\n三行"),
        (Task.DOCUMENT, None, "a\nb\nc\nd\ne\nf"),
    ),
    "prompted": (
        (Task.QUERY, None, "task: search result | query: where is the key?"),
        (Task.QUERY, None, "task: search result | query: 钥匙在哪里？"),
        (Task.QUERY, None, "task: clustering | query: opening hours of the pool"),
        (Task.DOCUMENT, None, "title: none | text: The key hangs behind the door."),
        (Task.DOCUMENT, None, "title: Keys | text: The spare key is with the neighbour."),
        (Task.DOCUMENT, "Keys", "title: none | text: 钥匙挂在门后面。"),
    ),
}

_SENTENCES: dict[str, tuple[str, str] | tuple[str, str, tuple[str, str]]] = {
    "en": (
        "Where can I leave my bicycle during the concert?",
        "The mill by the river ground its last flour forty years ago.",
        ("Ferries", "The first ferry leaves at six, the last one at midnight."),
    ),
    "zh": ("下雨天还开门吗？", "山上的小店只卖热汤和面包。", ("借书证", "办理借书证需要带身份证和一张照片。")),
    "zh-Hant": ("這條路通到海邊嗎？", "老師把學生的畫掛在走廊上。", ("車票", "車票在開車前一小時停止販售。")),
    "ja": (
        "この切符は明日も使えますか。",
        "祖母は毎朝、庭の花に水をやる。",
        ("図書館", "図書館は月曜日が休みです。"),
    ),
    "ko": (
        "우산을 어디에서 빌릴 수 있나요?",
        "강가에 있는 작은 찻집은 일찍 문을 닫는다.",
        ("주차 안내", "주차장은 밤 열 시에 닫힙니다."),
    ),
    "de": (
        "Wie lange ist die Brücke noch gesperrt?",
        "Im Herbst riecht der ganze Hof nach Äpfeln.",
        ("Müllabfuhr", "Die grauen Tonnen werden jeden zweiten Dienstag geleert."),
    ),
    "fr": (
        "À quelle heure ferme la piscine le dimanche ?",
        "Le boulanger du village se lève à trois heures du matin.",
        ("Règlement", "Les chiens sont admis s'ils sont tenus en laisse."),
    ),
    "es": (
        "¿Dónde se paga el billete del autobús?",
        "La abuela guarda las cartas en una caja de lata.",
        ("Horario", "La oficina abre de lunes a viernes por la mañana."),
    ),
    "it": ("Quanto costa spedire un pacco in Italia?", "Il gatto dorme sulla sedia accanto alla finestra."),
    "pt": (
        "Posso devolver o livro em outra biblioteca?",
        "O vento levou o chapéu do pescador para o mar.",
        ("Garantia", "A garantia vale por dois anos a partir da compra."),
    ),
    "nl": ("Waar kan ik mijn fiets laten repareren?", "De boot ligt al drie weken in de haven."),
    "sv": ("När går det sista tåget hem?", "Snön låg kvar på taken ända till april."),
    "da": ("Hvor finder jeg nøglen til kælderen?", "Drengen byggede en drage af papir og snor."),
    "nb": ("Hvor lenge varer turen over fjellet?", "Det gamle fyret står tomt om vinteren."),
    "fi": ("Mistä voin ostaa lipun lautalle?", "Järven jää kesti vielä maaliskuussa."),
    "is": ("Hvenær opnar sundlaugin á morgun?", "Kindurnar komu heim af fjöllum í haust."),
    "pl": (
        "Gdzie mogę wymienić pieniądze?",
        "W starym młynie mieszka teraz rodzina bocianów.",
        ("Zwroty", "Towar można zwrócić w ciągu czternastu dni."),
    ),
    "cs": ("Kdy se otevírá pokladna divadla?", "Děti sbíraly kaštany pod velkým stromem."),
    "sk": ("Koľko stojí lístok na vlak?", "Starý most cez potok treba opraviť."),
    "hu": ("Hol lehet kerékpárt bérelni?", "A kertben már érik a meggy."),
    "ro": ("Unde pot lăsa bagajele până seara?", "Bunicul repară ceasuri vechi în atelier."),
    "hr": ("Gdje je najbliža ljekarna?", "Ribari se vraćaju prije zore."),
    "sl": ("Kdaj pride avtobus v vas?", "Na travniku se pasejo tri krave."),
    "lt": ("Kur galima palikti dviratį?", "Senelė kepa duoną kiekvieną šeštadienį."),
    "lv": ("Cik ilgi jāgaida atbilde?", "Ezera krastā aug vecs ozols."),
    "et": ("Kust saab osta piletit?", "Metsa taga on väike punane maja."),
    "el": ("Πότε φεύγει το πλοίο για το νησί;", "Ο κήπος μυρίζει βασιλικό και δυόσμο."),
    "ru": (
        "Где можно получить посылку?",
        "Старый фонарь горел всю ночь у ворот.",
        ("Правила", "В читальном зале нельзя разговаривать по телефону."),
    ),
    "uk": ("Коли відчиняється музей?", "Діти запускали паперового змія над полем."),
    "bg": ("Колко струва билетът за замъка?", "Лозето на хълма ражда сладко грозде."),
    "sr": ("Где се налази пошта?", "Река се излила после дуге кише."),
    "tr": (
        "Bu otobüs müzeye gider mi?",
        "Komşumuz her sabah balkonda çay içer.",
        ("Teslimat", "Siparişler iki iş günü içinde gönderilir."),
    ),
    "az": ("Kitabxana saat neçədə açılır?", "Bağda nar ağacları çiçəkləyib."),
    "ar": ("متى يفتح المتحف أبوابه؟", "يجلس الصياد على الشاطئ كل مساء.", ("المواعيد", "يغلق المكتب يوم الجمعة.")),
    "fa": ("این اتوبوس به ایستگاه می‌رود؟", "باران تمام شب روی بام می‌بارید."),
    "ur": ("دکان کس وقت کھلتی ہے؟", "بچے درخت کے نیچے کھیل رہے ہیں۔"),
    "he": ("איפה אפשר להחזיר את הספר?", "החתול ישן על המדרגות כל היום.", ("שעות פתיחה", "המשרד סגור בימי שבת.")),
    "hi": (
        "यह टिकट कल भी चलेगा क्या?",
        "नदी के किनारे एक पुराना मंदिर है।",
        ("नियम", "पुस्तकालय में शोर करना मना है।"),
    ),
    "bn": ("দোকানটা কখন খোলে?", "নৌকাটা ঘাটে বাঁধা আছে।"),
    "ta": ("பேருந்து எப்போது வரும்?", "தோட்டத்தில் மாம்பழங்கள் பழுத்துள்ளன."),
    "te": ("రైలు ఎన్ని గంటలకు వస్తుంది?", "పిల్లలు చెరువు దగ్గర ఆడుకుంటున్నారు."),
    "th": ("ร้านนี้เปิดกี่โมง", "แมวนอนอยู่บนหลังคาบ้าน", ("ประกาศ", "ห้องสมุดปิดทำการวันจันทร์")),
    "vi": ("Mấy giờ thì cửa hàng mở cửa?", "Con thuyền nhỏ nằm yên trên bến sông."),
    "id": ("Di mana saya bisa menyewa sepeda?", "Nelayan itu pulang sebelum matahari terbit."),
    "sw": ("Basi la mwisho linaondoka saa ngapi?", "Watoto wanacheza chini ya mwembe."),
}
