"""What is wrong with a corpus: `endora audit`.

`listing` says which videos there are, `examination` looks at one of them, with `frame_hash` and `burned_in_text`,
`near_duplicates` compares them all, `report` writes down what was found; `audit` is the story of these.
"""
