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
        李明 王强 张伟 刘凯 陈刚 杨帆 赵勇 黄健 周斌 吴浩 徐杰 孙鹏 马骏 朱辉 胡波 郭磊 何亮 高翔 林涛 罗成
        郑峰 梁栋 宋阳 唐宁 许冬 韩雷 冯军 邓飞 曹志 彭华 曾野 肖平 田帅 董武 袁海 潘文 于达 蒋庆 蔡江 余枫
        杜功 叶航 程东 苏良 魏山 吕远 丁毅 任俊 沈森 姚维 卢康 姜岩 崔川 钟洋 谭坚 陆鑫 汪松 范恒 金凡 石光
        廖雨 贾力 夏安 韦正 付春 方威 白昊 邹宇 孟辰 熊晖"""),
}
FEMALE = {
    "en": _words("""
        Anna Mary Lucy Jane Kate Emma Rose Lily Ella Amy Alice Betty Carol Diana Eva Fiona Grace Helen
        Iris Julia Karen Laura Mia Nancy Olivia Paula Rita Sara Tina Vera Wendy Zoe Amber Bella Clara
        Daisy Elsa Flora Gina Hanna Ivy Joan Kelly Linda Maria Nora Olga Pam Rachel Sophie Tracy Uma
        Violet Wanda Ada Bonnie Cora Doris Edith Faye Gloria Hazel Ida Judy Lena Mona Nell Opal Peggy
        Ruth"""),
    "zh": _words("""
        王芳 李丹 张倩 刘静 陈丽 赵柳 杨雪 黄莺 周慧 吴霞 徐婷 孙燕 马莉 朱玲 胡蕾 郭敏 何兰 高洁 林娜 罗爽
        郑琳 梁艳 宋甜 唐佳 许梅 韩晴 冯蓉 邓琴 曹娟 彭萍 曾柔 肖蕊 田红 董婉 袁圆 潘薇 于虹 蒋音 蔡鹃 余青
        杜晨 叶珊 程玉 苏莹 魏香 吕姗 丁冰 任瑶 沈珍 姚妍 卢颖 姜灵 崔咏 钟蔓 谭菲 陆晶 汪铃 范芬 金云 石荷
        廖妮 贾笛 夏秀 韦英 付秋 方岚 白月 邹璐 孟瑜 熊媛"""),
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
