"""Who lives in the small world: common names, two characters each in Chinese; and parts of unknown names."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MALE = {
    "en": _words("""
        Tom John Jack Sam Ben Max Leo Paul Mark Luke Adam Alan Carl Dan Eric Fred Gary Henry Ivan James
        Kevin Larry Mike Neil Oscar Peter Ryan Simon Tony Victor Walter Alex Brian Colin David Edgar
        Frank George Hugo Ian Jacob Keith Louis Martin Nick Owen Philip Ralph Scott Theo Vince Wade
        Arthur Bruce Chris Dean Elton Felix Glen Harry Isaac Jeff Kurt Lance Miles Noah Otto Rob Steve
        Tim"""),
    "zh": _words("""
        李明 王强 张伟 刘凯 陈刚 杨帆 赵勇 黄健 周斌 吴浩 徐杰 孙鹏 马骏 朱辉 胡波 郭磊 何亮 高翔 林浩 罗成
        郑凯 梁栋 宋阳 唐宁 许林 韩冬 冯雷 邓辉 曹阳 彭飞 曾勇 肖军 田野 董平 袁军 潘峰 于海 蒋文 蔡军 余波
        杜斌 叶枫 程勇 苏凯 魏东 吕良 丁浩 任远 沈亮 姚远 卢俊 姜涛 崔鹏 钟伟 谭勇 陆平 汪强 范斌 金辉 石磊
        廖军 贾明 夏峰 韦力 付强 方圆 白杨 邹恒 孟浩 熊伟"""),
}
FEMALE = {
    "en": _words("""
        Anna Mary Lucy Jane Kate Emma Rose Lily Ella Amy Alice Betty Carol Diana Eva Fiona Grace Helen
        Iris Julia Karen Laura Mia Nancy Olivia Paula Rita Sara Tina Vera Wendy Zoe Amber Bella Clara
        Daisy Elsa Flora Gina Hanna Ivy Joan Kelly Linda Maria Nora Olga Pam Rachel Sophie Tracy Uma
        Violet Wanda Ada Bonnie Cora Doris Edith Faye Gloria Hazel Ida Judy Lena Mona Nell Opal Peggy
        Ruth"""),
    "zh": _words("""
        王芳 李丹 张倩 刘静 陈丽 杨柳 赵雪 黄莺 周慧 吴霞 徐婷 孙燕 马莉 朱玲 胡静 郭玲 何敏 高洁 林静 罗丹
        郑燕 梁艳 宋敏 唐洁 许婷 韩梅 冯洁 邓琴 曹娟 彭莉 曾静 肖莉 田甜 董婷 袁慧 潘丽 于倩 蒋敏 蔡霞 余洁
        杜娟 叶婷 程琳 苏敏 魏娜 吕莹 丁慧 任静 沈洁 姚瑶 卢珊 姜丽 崔敏 钟艳 谭静 陆萍 汪婷 范莉 金玉 石慧
        廖静 贾芳 夏荷 韦娟 付丽 方芳 白雪 邹蓉 孟婷 熊英"""),
}  # fmt: skip

# First and second parts of the names of people who do not exist; in Chinese rare double surnames.
UNKNOWN = {
    "en": (
        _words("Zor Quil Brax Vel Drom Xan Plim Gorv Yul Snor Trax Wib Klep Oph Jurn Flob"),
        _words("dax vonk lith mar pod zel quin thor bix nug rell sko wump fizz gorn tuk"),
    ),
    "zh": (
        _words("司马 欧阳 上官 诸葛 皇甫 令狐 慕容 公孙 东方 南宫 尉迟 夏侯"),
        _words("逸 轩 梓 涵 睿 曦 瀚 铭 琪 翊 骁 淳 弈 烨 珂 瑾"),
    ),
}
