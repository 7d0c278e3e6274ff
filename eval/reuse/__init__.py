"""What reusing KV across prompts changes, gains and costs: by method, beside full reading of the same prompts.

    edits.py      controlled edits: by kind, place and share of the tokens
    moved.py      most of a prompt in passages of a cached one, in another order; and wrong and random donors
    facts.py      texts of which one fact has another value
    arrivals.py   chat questions, summaries, translations, unfiltered and in order
    methods.py    what is compared

`python -m eval.reuse` runs them.
"""
