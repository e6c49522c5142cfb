"""Operations with more than one backend; each folder's api.py chooses."""
