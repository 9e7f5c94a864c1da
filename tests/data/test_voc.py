"""The layout of PASCAL VOC: lists, annotations, difficult objects, and XML from anyone."""
import pytest

from timm_miil import catalog
from timm_miil.data import find_format, list_splits, open_split

VOC = catalog.label_set('voc_20').labels


def annotation(*objects):
    """The text of an annotation file; an object is a name, or a name and what `difficult` says."""
    rows = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>1</xmin></bndbox>'
        f'<part><name>head</name><difficult>1</difficult></part></object>'
        for name, difficult in (item if isinstance(item, tuple) else (item, 0) for item in objects))
    return f'<annotation><folder>VOC2007</folder><source><name>flickr</name></source>{rows}</annotation>'


@pytest.fixture
def write(tmp_path, add_pictures):
    """Write a data set of annotations by picture, listed in train.txt."""
    def write_voc(texts, root='.', split='train', suffix='.jpg'):
        folder = tmp_path / root
        add_pictures(*(f'{root}/JPEGImages/{name}{suffix}' for name in texts))
        (folder / 'Annotations').mkdir(exist_ok=True)
        (folder / 'ImageSets' / 'Main').mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / 'Annotations' / f'{name}.xml').write_text(text, encoding='utf-8')
        (folder / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(texts) + '\n\n')
        return tmp_path
    return write_voc


def present(records):
    """Names of the labels of each picture, by value."""
    return [
        {name: value for name, value in zip(records.label_names, row) if value} for row in records.targets.tolist()]


def test_labels_are_the_20_classes(write):
    data_dir = write({
        '000005': annotation('chair', 'chair', 'dog'), '2007_000027': annotation(), '7': annotation('person')})
    (data_dir / 'ImageSets' / 'Main' / 'dog_train.txt').write_text('000005  1\n')
    assert find_format(data_dir) == 'voc' and list_splits(data_dir) == ('train',)
    records = open_split(data_dir, 'train')
    assert records.label_names == VOC
    assert present(records) == [{'chair': 1, 'dog': 1}, {}, {'person': 1}]
    assert [path.name for path in records.image_paths] == ['000005.jpg', '2007_000027.jpg', '7.jpg']
    assert records.load_image(0).size == (5, 3)


@pytest.mark.parametrize('option, value', [('unknown', -1), ('present', 1), ('absent', 0)])
def test_what_only_difficult_objects_show(option, value, write):
    data_dir = write({
        '1': annotation(('dog', 1)), '2': annotation(('dog', 1), 'dog'), '3': annotation('dog', ('dog', 1))})
    got = open_split(data_dir, 'train', difficult=option).with_labels(['dog']).targets.tolist()
    assert got == [[value], [1], [1]]
    assert open_split(data_dir, 'train').with_labels(['dog']).targets.tolist() == [[-1], [1], [1]]


def test_own_classes_are_given_and_matched_by_name(write):
    data_dir = write({'1': annotation('screw'), '2': annotation('bolt')})
    with pytest.raises(ValueError, match=(
            r"Annotations has labels that are not among the 20 given ones: 'screw' \(1.xml\), "
            r"'bolt' \(2.xml; did you mean 'boat'\?\)")):
        open_split(data_dir, 'train')
    records = open_split(data_dir, 'train', labels=['bolt', 'nut', 'screw'])
    assert records.targets.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert open_split(data_dir, 'train', labels=['bolt'], ignore_unknown_labels=True).targets.tolist() == [[0], [1]]


@pytest.mark.parametrize('root', ['VOC2012', 'VOCdevkit/VOC2012'])
def test_years_lie_in_folders_of_their_own(root, write):
    data_dir = write({'1': annotation('dog')}, root=root)
    assert present(open_split(data_dir, 'train')) == [{'dog': 1}]
    write({'2': annotation('cat')}, root='VOCdevkit/VOC2007', split='trainval')
    with pytest.raises(ValueError, match='has VOC20.., VOC20..; give year to choose one'):
        find_format(data_dir)
    assert present(open_split(data_dir, 'trainval', format='voc', year='2007')) == [{'cat': 1}]


def test_pictures_may_be_of_other_kinds(write):
    data_dir = write({'1': annotation('dog')}, suffix='.PNG')
    assert open_split(data_dir, 'train').image_paths[0].name == '1.PNG'


def test_missing_files_are_counted_and_named(write):
    data_dir = write({str(number): annotation() for number in range(7)})
    (data_dir / 'JPEGImages' / '3.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=(
            r"1 of 7 pictures of .*train.txt are missing in .*JPEGImages: '3.jpg'\.$")):
        open_split(data_dir, 'train')
    for number in range(7):
        (data_dir / 'Annotations' / f'{number}.xml').unlink()
    with pytest.raises(FileNotFoundError, match=(
            r"7 of 7 annotations of .*train.txt are missing in .*: '0.xml', .* and 2 more\.$")):
        open_split(data_dir, 'train')


@pytest.mark.parametrize('text, words', [
    ('1\n2\n1\n', "train.txt, line 3: picture '1' is on line 1 already"),
    ('1  1\n', "train.txt, line 1: one picture a line is expected, got '1  1'"),
    ('../1\n', "train.txt, line 1: a picture must be a path .* got '../1'"),
    ('\n', 'train.txt has no pictures'),
])
def test_lists_that_are_none(text, words, write):
    data_dir = write({'1': annotation(), '2': annotation()})
    (data_dir / 'ImageSets' / 'Main' / 'train.txt').write_text(text)
    with pytest.raises(ValueError, match=words):
        open_split(data_dir, 'train')


BOMB = '<!DOCTYPE a [<!ENTITY a "dog"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>' + annotation('&b;')
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>\n' + annotation('&a;')


@pytest.mark.parametrize('text, words', [
    (BOMB, 'line 1: a document type is not expected; remove the line'),
    (OUTSIDE, 'line 1: a document type is not expected'),
    (annotation('&what;'), 'line 1: undefined entity'),
    ('<annotation>\n<object>\n', 'line 3: no element found'),
    ('', 'line 1: no element found'),
    ('{}', 'line 1: syntax error|line 1: not well-formed'),
    ('<html></html>', "line 1: the outermost element must be 'annotation', got 'html'"),
    ('<annotation>\n<object><difficult>0</difficult></object></annotation>', 'line 2: an object has no name'),
    (annotation(('dog', 'maybe')), "line 1: difficult must be 0 or 1, got 'maybe'"),
    ('<?xml version="1.0" encoding="klingon"?>' + annotation(), 'line 1: unknown encoding'),
])
def test_annotations_that_are_none_are_one_error(text, words, write):
    with pytest.raises(ValueError, match=rf'1\.xml, {words}') as raised:
        open_split(write({'1': text}), 'train')
    assert '\n' not in str(raised.value)


def test_names_come_whole_in_any_encoding(write):
    data_dir = write({'1': annotation('dog')})
    text = '<?xml version="1.0" encoding="latin-1"?>' + annotation('Caf\xe9 &amp; <![CDATA[B]]>ar')
    (data_dir / 'Annotations' / '1.xml').write_bytes(text.encode('latin-1'))
    assert present(open_split(data_dir, 'train', labels=['Caf\xe9 & Bar'])) == [{'Caf\xe9 & Bar': 1}]
