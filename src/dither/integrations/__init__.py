"""Where people use models: one file for each host, which is imported by name.

``dither.integrations.transformers`` reads and writes folders of transformers, and trains in its
``Trainer``; ``dither.integrations.lightning`` trains in Lightning; ``dither.integrations.peft``
keeps adapters. Each needs its host, and nothing else of dither imports them.
"""
