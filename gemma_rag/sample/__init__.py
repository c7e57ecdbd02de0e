"""The sample handbook: 42 short documents in 7 categories, half English, half Chinese."""
