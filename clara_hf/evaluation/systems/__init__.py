"""The systems that an evaluation compares: a ranker or a rule chooses documents, a reader answers from them.

A ranker has `prepare(examples, corpus)`, called once per data file, and `rank(examples)`; a reader has
`prepare(documents)` and `answer(questions, documents)`. Both work on one batch at a time; `prepare` returns how many
documents it worked on. A ranking holds candidate positions (into `QAExample.docs`), best first.
"""
