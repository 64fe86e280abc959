"""The nano world: documents about invented people, places, companies and works, and questions about them.

    python recipes/nano/world.py --out runs/nano/data --seed 0

writes scp_{train,validation}, instruct_{train,validation}, joint_{train,validation} and test as JSONL. All
of it follows from the seed. The splits share no word of any name; a reference to another entity stays in its split.
"""

import gc
import hashlib
import itertools
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

from lexicon import (  # noqa: E402
    ATTRIBUTES,
    BEGINNINGS,
    ENDINGS,
    INTRODUCTIONS,
    KINDS,
    LINKS,
    NAME_QUESTIONS,
    PRONOUNS,
    SUBJECTS,
)

from clara_hf.program import UsageError, option, parse, run_program, write_json, write_text


SPLITS = ("train", "validation", "test")
ENTITIES = {
    "train": {"person": 1600, "place": 800, "company": 800, "work": 800},
    "validation": {"person": 150, "place": 100, "company": 100, "work": 100},
    "test": {"person": 300, "place": 200, "company": 200, "work": 200},
}
QUESTIONS = {"instruct_train": 6000, "joint_train": 48000, "test": 600, "validation": 300}
# Instruction rows stand for what a retriever found: with this chance the gold documents come first.
GOLD_FIRST_SHARE = 0.6
CANDIDATES = 20
DESCRIBING_FACTS = (2, 3)
TWO_HOP_SHARE = {"train": 0.3, "validation": 0.25, "test": 0.25}
# Of one-document questions; most of those that are trained on are described ones, which are harder to learn.
NAMED_SHARE = {"train": 0.1, "validation": 0.25, "test": 0.25}

CLOSED = {kind: {attribute.key: attribute for attribute in ATTRIBUTES[kind]} for kind in KINDS}
ORDER = {kind: [*(link.key for link in LINKS[kind]), *CLOSED[kind]] for kind in KINDS}
NAMED = {kind: {link.key: link for link in LINKS[kind]} for kind in KINDS}


@dataclass(eq=False)
class Entity:
    """One person, place, company or work; `said` maps each fact of its document to the wording used there."""

    kind: str
    name: str
    pronoun: str
    values: dict[str, int]
    links: dict[str, "Entity"] = field(default_factory=dict, repr=False)
    said: dict[str, int] = field(default_factory=dict)
    document: str = ""
    paraphrase: str = ""

    @cached_property
    def name_ends(self) -> tuple[str, str]:
        """The name's first three letters and its last word."""
        return self.name[:3], self.name.split()[-1]

    def shares(self, other: "Entity", key: str) -> bool:
        """Whether both have the same value of the closed attribute `key`."""
        return self.kind == other.kind and self.values[key] == other.values[key]


@dataclass
class Question:
    """A question, its accepted answers (the first is the trained one), its gold entities and how it describes them."""

    text: str
    answers: list[str]
    gold: list[Entity]
    type: str
    named: bool
    described: dict[str, int] = field(default_factory=dict)
    hint: dict[str, int] = field(default_factory=dict)


class World:
    """The entities of one split, with an index of who says what."""

    def __init__(self, split: str, counts: dict[str, int], rng: random.Random, shuffled: bool = False):
        self.split = split
        taken: set[str] = set()
        self.entities = [make_entity(kind, split, taken, rng) for kind in KINDS for _ in range(counts[kind])]
        self.of_kind = {kind: [entity for entity in self.entities if entity.kind == kind] for kind in KINDS}
        for entity in self.entities:
            for link in LINKS[entity.kind]:
                entity.links[link.key] = rng.choice(self.of_kind[link.target])
            write_document(entity, rng, shuffled)
        self.sayers: dict[tuple[str, str, int], list[Entity]] = defaultdict(list)
        for entity in self.entities:
            for key in closed_said(entity):
                self.sayers[entity.kind, key, entity.values[key]].append(entity)


def split_of(word: str) -> str:
    """The split that owns a word of a name: 7 of 10 words belong to train, 1 to validation, 2 to test."""
    bucket = hashlib.sha256(word.encode()).digest()[0] % 10
    return "train" if bucket < 7 else "validation" if bucket == 7 else "test"


@cache
def name_words(split: str, category: str) -> tuple[str, ...]:
    """All words that names of `category` (first, last, place, company, work) may use in `split`."""
    words = (beginning + ending for beginning in BEGINNINGS for ending in ENDINGS[category])
    return tuple(word for word in words if split_of(word) == split)


def make_entity(kind: str, split: str, taken: set[str], rng: random.Random) -> Entity:
    """An entity with an unused name and independent, uniformly drawn values."""
    categories = ("first", "last") if kind == "person" else (kind,)
    while True:
        name = " ".join(rng.choice(name_words(split, category)) for category in categories)
        if name not in taken:
            break
    taken.add(name)
    pronoun = rng.choice(("She", "He"))
    return Entity(kind, name, pronoun, {key: rng.randrange(len(a.values)) for key, a in CLOSED[kind].items()})


def closed_said(entity: Entity) -> list[str]:
    """The closed attributes that the entity's document tells."""
    return [key for key in entity.said if key in entity.values]


def predicate(entity: Entity, key: str, wording: int) -> str:
    """A fact as a predicate: "works for Kelvex"."""
    if key in entity.values:
        return CLOSED[entity.kind][key].wordings[entity.values[key]][wording]
    return NAMED[entity.kind][key].wordings[wording].format(N=entity.links[key].name)


def other_wording(wording: int | None, rng: random.Random) -> int:
    """A wording of the three that is not `wording`."""
    return rng.choice([w for w in range(3) if w != wording])


def render(entity: Entity, said: dict[str, int], rng: random.Random) -> str:
    """The facts as an encyclopedic paragraph, in their order, in random sentence frames."""
    predicates = [predicate(entity, key, wording) for key, wording in said.items()]
    subject = rng.choice(INTRODUCTIONS[entity.kind]).format(N=entity.name)
    sentences = []
    while predicates:
        size = min(len(predicates), rng.choice((1, 2, 2, 3)))
        part, predicates = predicates[:size], predicates[size:]
        if size > 1 and not sentences and rng.random() < 0.4:
            pronoun = "who" if entity.kind == "person" else "which"
            sentences.append(f"{subject}, {pronoun} {part[0]}, {' and '.join(part[1:])}.")
        else:
            sentences.append(f"{subject} {', '.join(part[:-1])}{' and ' if size > 1 else ''}{part[-1]}.")
        subject = entity.pronoun if entity.kind == "person" else rng.choice(PRONOUNS[entity.kind])
    return " ".join(sentences)


def write_document(entity: Entity, rng: random.Random, shuffled: bool) -> None:
    """Chooses which facts are told and how; the paraphrase tells the same facts, each in another wording.

    As in an encyclopedia the facts of a kind have one order, unless they are `shuffled`.
    """
    closed = rng.sample(sorted(entity.values), 4 if entity.kind == "person" else rng.choice((4, 5)))
    entity.said = {key: rng.randrange(3) for key in [*closed, *entity.links]}
    if not shuffled:
        entity.said = {key: entity.said[key] for key in ORDER[entity.kind] if key in entity.said}
    entity.document = render(entity, in_order(entity.said, shuffled, rng), rng)
    other = {key: other_wording(wording, rng) for key, wording in entity.said.items()}
    entity.paraphrase = render(entity, in_order(other, shuffled, rng), rng)


def in_order(said: dict[str, int], shuffled: bool, rng: random.Random) -> dict[str, int]:
    """`said` as it is, or in random order."""
    keys = list(said)
    if shuffled:
        rng.shuffle(keys)
    return {key: said[key] for key in keys}


def ask(entity: Entity, key: str, subject: str, rng: random.Random) -> tuple[str, list[str]]:
    """A question for one fact (or the name, key "name") of the entity called `subject`, and its accepted answers."""
    if key == "name":
        return rng.choice(NAME_QUESTIONS[entity.kind]).format(S=subject), [entity.name]
    if key in entity.links:
        return rng.choice(NAMED[entity.kind][key].questions).format(S=subject), [entity.links[key].name]
    attribute = CLOSED[entity.kind][key]
    value = entity.values[key]
    return rng.choice(attribute.questions).format(S=subject), [attribute.values[value], *attribute.wordings[value]]


def describe(entity: Entity, keys: list[str], rng: random.Random) -> tuple[str, dict[str, int]]:
    """The subject by some of its facts, each in a wording that its document does not use."""
    wordings = {key: other_wording(entity.said.get(key), rng) for key in keys}
    *others, last = (predicate(entity, key, wording) for key, wording in wordings.items())
    predicates = f"{', '.join(others)} and {last}" if others else last
    return f"{rng.choice(SUBJECTS[entity.kind])} {predicates}", wordings


def asked_fact(entity: Entity, named: bool, rng: random.Random) -> str:
    """The fact to ask for: closed ones twice as often as names."""
    keys = closed_said(entity) * 2 + list(entity.links) + ([] if named else ["name"])
    return rng.choice(keys)


def single_question(entity: Entity, named: bool, rng: random.Random, facts: int = 2) -> Question:
    """A question that one document answers; unless named, the subject is described by `facts` of its other facts."""
    key = asked_fact(entity, named, rng)
    if named:
        text, answers = ask(entity, key, entity.name, rng)
        return Question(text, answers, [entity], "single", True)
    subject, wordings = describe(entity, rng.sample([k for k in closed_said(entity) if k != key], facts), rng)
    text, answers = ask(entity, key, subject, rng)
    return Question(text, answers, [entity], "single", False, wordings)


def two_hop_question(entity: Entity, key: str, rng: random.Random, facts: int = 2, hints: int = 2) -> Question:
    """A question about the entity that `entity` links to by `key`; both are hinted at by facts in other wordings.

    The base decoder is trained with these; their answer stands in the second document alone.
    """
    target = entity.links[key]
    asked, *hint = rng.sample(closed_said(target), 1 + hints)
    subject, described = describe(entity, rng.sample(closed_said(entity), facts), rng)
    bridge, wordings = describe(target, hint, rng)
    text, answers = ask(target, asked, f"{bridge} and {NAMED[entity.kind][key].bridge} {subject}", rng)
    return Question(text, answers, [entity, target], "two-hop", False, described, wordings)


def two_document_question(entity: Entity, key: str, rng: random.Random, facts: int = 2) -> Question:
    """A question for a fact of `entity`, which it names, and one of the entity that `entity` links to by `key`.

    The second is described by `facts` of its other facts, and its name stands in the first document only.
    """
    target = entity.links[key]
    asked = rng.choice(closed_said(entity))
    other, *described = rng.sample(closed_said(target), 1 + facts)
    subject, hint = describe(target, described, rng)
    first, second = CLOSED[entity.kind][asked], CLOSED[target.kind][other]
    subject = f"{subject} and {NAMED[entity.kind][key].bridge} this {entity.kind}"
    text = f"What are the {first.noun} of {entity.name}, and the {second.noun} of {subject}?"
    answer = f"{first.values[entity.values[asked]]} and {second.values[target.values[other]]}"
    return Question(text, [answer], [entity, target], "two-hop", True, hint=hint)


def complex_question(entity: Entity, subject: str, rng: random.Random) -> tuple[str, str]:
    """A question for two closed facts at once, with its answer."""
    first, second = (CLOSED[entity.kind][key] for key in rng.sample(closed_said(entity), 2))
    answers = [attribute.values[entity.values[attribute.key]] for attribute in (first, second)]
    return f"What are the {first.noun} and the {second.noun} of {subject}?", " and ".join(answers)


def matches(entity: Entity, question: Question) -> bool:
    """Whether the entity could be taken for the question's first subject (gold entities included)."""
    gold = question.gold[0]
    if question.named:
        return entity.name == gold.name
    return fits(entity, gold, question.described)


def fits(entity: Entity, gold: Entity, described: dict[str, int]) -> bool:
    """Whether all facts by which `gold` is described hold of the entity as well."""
    return all(entity.shares(gold, key) for key in described)


def random_question(world: World, rng: random.Random) -> Question:
    """One question in the mixture of the data files."""
    if rng.random() < TWO_HOP_SHARE[world.split]:
        entity = rng.choice(world.entities)
        return two_document_question(entity, rng.choice(list(entity.links)), rng, rng.choice(DESCRIBING_FACTS))
    return single_question(
        rng.choice(world.entities), rng.random() < NAMED_SHARE[world.split], rng, rng.choice(DESCRIBING_FACTS)
    )


def _sharing(world: World, gold: Entity, wordings: dict[str, int], rng: random.Random) -> list[Entity]:
    """Entities whose documents tell described facts in any wording; the two that share the most come first."""
    shared = Counter(entity for key in wordings for entity in world.sayers[gold.kind, key, gold.values[key]])
    found = list(shared.items())
    rng.shuffle(found)
    closest = sorted(found, key=lambda pair: -pair[1])[:2]
    return list(dict.fromkeys(entity for entity, _ in closest + found))


def _related(world: World, question: Question, rng: random.Random) -> list[Entity]:
    """Entities that share a name with the gold ones: linked from them, linking to the same, or of the same surname."""
    gold = question.gold[0] if question.named else question.gold[-1]
    same = [e for e in rng.sample(world.of_kind[gold.kind], min(400, len(world.of_kind[gold.kind]))) if e is not gold]
    beginning, last = gold.name_ends
    shared = [e for e in same if e.name_ends[0] == beginning or e.name_ends[1] == last]
    linked = set(gold.links.values())
    colleagues = (e for e in same if not linked.isdisjoint(e.links.values()))
    return rng.sample(shared, min(2, len(shared))) + [*islice(colleagues, 1), *islice(gold.links.values(), 1)]


def candidates(world: World, question: Question, rng: random.Random, count: int = CANDIDATES) -> list[Entity]:
    """The gold entities among `count` shuffled candidates; no other candidate fits the question's descriptions.

    Of 20, 6 to 10 share one of the described facts, half of them one of the second document where both are described;
    a few share names, the rest is random.
    """
    chosen = dict.fromkeys(question.gold)

    def extend(entities: list[Entity], limit: int) -> None:
        for entity in entities:
            if len(chosen) >= min(limit, count):
                return
            if not matches(entity, question) and not (question.hint and fits(entity, question.gold[1], question.hint)):
                chosen.setdefault(entity)

    hard = len(chosen) + rng.randint(6, 10) * count // CANDIDATES
    if question.described and question.hint:
        extend(_sharing(world, question.gold[1], question.hint, rng), (len(chosen) + hard) // 2)
    elif question.hint:
        extend(_sharing(world, question.gold[1], question.hint, rng), hard)
    if question.described:
        extend(_sharing(world, question.gold[0], question.described, rng), hard)
    extend(_related(world, question, rng), len(chosen) + 4)
    same = world.of_kind[question.gold[0].kind]
    extend(rng.sample(same, min(len(same), count)), (len(chosen) + count) // 2)
    extend(rng.sample(world.entities, min(len(world.entities), 3 * count)), count)
    result = list(chosen)
    rng.shuffle(result)
    return result


def question_row(world: World, name: str, rng: random.Random, count: int = CANDIDATES, gold_first: float = 0.0) -> dict:
    """One row of the question files; `gold_first` is the chance that the gold documents lead the others."""
    question = random_question(world, rng)
    docs = candidates(world, question, rng, max(count, len(question.gold)))
    if gold_first and rng.random() < gold_first:
        docs.sort(key=lambda entity: entity not in question.gold)
    return {
        "id": name,
        "type": question.type,
        "named": question.named,
        "question": question.text,
        "answers": question.answers,
        "pos_index": [docs.index(entity) for entity in question.gold],
        "docs": [entity.document for entity in docs],
    }


def qa_pairs(entity: Entity, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Simple question-answer pairs, each about another fact; the subject is named or described by one other fact."""
    pairs = []
    asked = rng.sample(list(entity.said), min(count, len(entity.said)))
    for key in sorted(asked, key=list(entity.said).index):
        subject = entity.name
        if rng.random() < 0.5:
            subject, _ = describe(entity, rng.sample([k for k in closed_said(entity) if k != key], 1), rng)
        text, answers = ask(entity, key, subject, rng)
        pairs.append((text, answers[0]))
    return pairs


def scp_rows(entity: Entity, rng: random.Random) -> list[dict]:
    """The SCP rows of one entity: QA over both wordings of its document, simple and complex, and both paraphrases."""
    rows = []
    for document in (entity.document, entity.paraphrase):
        pairs = qa_pairs(entity, rng.randint(4, 6), rng)
        rows.append({"data_type": "qa", "question": [q for q, _ in pairs], "answers": [a for _, a in pairs]})
        rows[-1]["docs"] = [document]
    pairs = [complex_question(entity, entity.name, rng), *qa_pairs(entity, 2, rng)]
    subject, _ = describe(entity, [rng.choice(closed_said(entity))], rng)
    pairs.append(complex_question(entity, subject, rng))
    rng.shuffle(pairs)
    rows.append({"data_type": "qa", "question": [q for q, _ in pairs], "answers": [a for _, a in pairs]})
    rows[-1]["docs"] = [entity.document]
    for document, paraphrase in ((entity.document, entity.paraphrase), (entity.paraphrase, entity.document)):
        rows.append({"data_type": "paraphrase", "question": [], "answers": [paraphrase], "docs": [document]})
    return rows


def generate(
    seed: int, progress: Callable[[Iterable, str], Iterable] | None = None, count: int = CANDIDATES
) -> dict[str, list[dict]]:
    """All rows of all files, by file name without extension.

    Args:
        count: candidates of a question of the joint and test files.
        progress (*optional*): gets what each file is made from and the file's name; returns the same to go through.
    """
    follow = progress or (lambda items, name: items)
    rows: dict[str, list[dict]] = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}-{split}")
        world = World(split, ENTITIES[split], rng)
        if split == "test":
            rows["test"] = [
                question_row(world, f"test-{i}", rng, count) for i in follow(range(QUESTIONS["test"]), "test")
            ]
            continue
        scp = [row for entity in follow(world.entities, f"scp_{split}") for row in scp_rows(entity, rng)]
        rng.shuffle(scp)
        rows[f"scp_{split}"] = scp
        for stage in ("instruct", "joint"):
            name = f"{stage}_{split}"
            total = QUESTIONS.get(name, QUESTIONS["validation"])
            rows[name] = [
                question_row(world, f"{name}-{i}", rng, rng.randint(1, 5), GOLD_FIRST_SHARE)
                if stage == "instruct"
                else question_row(world, f"{name}-{i}", rng, count)
                for i in follow(range(total), name)
            ]
    return rows


def _questions(world: World, rng: random.Random, candidates: int) -> Iterator[dict]:
    for number in itertools.count():
        yield question_row(world, f"{world.split}-{number}", rng, candidates)


def more_test_questions(seed: int, count: int, candidates: int = CANDIDATES) -> list[dict]:
    """The `count` questions that would follow those of the test file, about the same entities, among as many
    `candidates`."""
    rng = random.Random(f"{seed}-test")
    first = QUESTIONS["test"]
    world = World("test", ENTITIES["test"], rng)
    return list(islice(_questions(world, rng, candidates), first, first + count))


def settings(seed: int, count: int = CANDIDATES) -> dict:
    """What the data depends on; two folders with equal settings hold equal files."""
    words = repr((ATTRIBUTES, LINKS, SUBJECTS, INTRODUCTIONS, PRONOUNS, NAME_QUESTIONS, BEGINNINGS, ENDINGS))
    return {
        "seed": seed,
        "lexicon": hashlib.sha256(words.encode()).hexdigest()[:16],
        "entities": ENTITIES,
        "questions": QUESTIONS,
        "candidates": count,
        "describing_facts": list(DESCRIBING_FACTS),
        "two_hop_share": TWO_HOP_SHARE,
        "named_share": NAMED_SHARE,
        "gold_first_share": GOLD_FIRST_SHARE,
    }


def ensure(
    out: str | os.PathLike,
    seed: int = 0,
    progress: Callable[[Iterable, str], Iterable] | None = None,
    count: int = CANDIDATES,
) -> bool:
    """Writes the data files to folder `out` unless they are there; returns whether it wrote them.

    The manifest is written last, so a folder without one is unfinished and is written again. `progress` and `count` are
    as in [`generate`].

    Raises:
        ValueError: the folder holds finished data made with other settings.
    """
    out = Path(out)
    manifest = out / "manifest.json"
    wanted = settings(seed, count)
    if manifest.exists():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if found["settings"] != wanted:
            differing = sorted(key for key in wanted if found["settings"].get(key) != wanted[key])
            raise ValueError(
                f"{out} holds data made with other settings ({', '.join(differing)}): choose another or remove it"
            )
        sizes = {name: (out / name).stat().st_size if (out / name).exists() else -1 for name in found["bytes"]}
        if sizes == found["bytes"]:
            return False
    out.mkdir(parents=True, exist_ok=True)
    sizes, collects = {}, gc.isenabled()
    gc.disable()  # there are millions of objects and no cycles to find: a quarter of the time
    try:
        for name, rows in generate(seed, progress, count).items():
            path = out / f"{name}.jsonl"
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            sizes[path.name] = path.stat().st_size
    finally:
        if collects:
            gc.enable()
    write_json(manifest, {"settings": wanted, "bytes": sizes})
    return True


@dataclass
class WorldArguments:
    """What is written, and where."""

    output_dir: str = option("runs/nano/data", "Folder for the JSONL files.", aliases="--out")
    seed: int = 0
    more_test: int | None = option(None, "Also write so many more test questions, to test_more.jsonl.")
    candidates: int = option(CANDIDATES, "Candidates per question, 2 or more.")

    def __post_init__(self):
        if self.candidates < 2:
            raise UsageError(f"--candidates is {self.candidates}; it must be at least 2.")


def main(arguments: list[str] | None = None) -> None:
    options = parse(WorldArguments, arguments, description="Write the nano world's data files.")
    wrote = ensure(options.output_dir, options.seed, count=options.candidates)
    if options.more_test:
        rows = more_test_questions(options.seed, options.more_test, options.candidates)
        write_text(Path(options.output_dir) / "test_more.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{'wrote' if wrote else 'kept'} {options.output_dir}")


if __name__ == "__main__":
    run_program(main)
