"""The systems that an evaluation compares: a ranker or a rule chooses documents, a reader answers from them.

A ranker has `load(name, options, device)`, which makes it, `prepare(examples, corpus)`, called once per data file, and
`rank(examples)`; a reader has `prepare(documents)` and `answer(questions, documents)`. Both work on one batch at a
time; `prepare` returns how many documents it worked on. A ranking holds positions in `QAExample.docs`, best first.
A new ranker is a class here and a line in `clara_hf.evaluation.plan.RANKERS`; a new metric is its score in
`results.question_record` and a title in `report.COLUMNS`.
"""
