"""Every file here is a family of models; there is no list to edit.

A family's class says which folders hold a model of its kind (`fits`) and how to load one.
"""
