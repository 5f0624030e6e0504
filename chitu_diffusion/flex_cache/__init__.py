"""FlexCache: reuse of features across the denoising steps of one task, by a strategy that the user names.

Every strategy is a module of `strategy/`, and everything here is off unless a request asks for it.
"""
