"""
Clients: set-ups of other people's models, trainers, data and adapters, each run for real with and without a start.

`client` says what one is, `runs` what is looked at, and each of the other modules lists some. `table` writes the page
`docs/clients.md` of all of them: `python tests/clients/table.py docs/clients.md`.
"""
