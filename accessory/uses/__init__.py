"""What a `MetaModel` is used for beside answers, a file a use; the class inherits these."""
