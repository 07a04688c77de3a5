"""Small true stories for `loratools demo`: real data, networks trained on the spot, no download.

A story gets the verbs handed in (`Verbs`), so this package knows none of them. The images are the
UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, CC BY 4.0); the
full credit is in `DIGITS.md` beside this file.
"""
